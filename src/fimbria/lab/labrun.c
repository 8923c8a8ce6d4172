// SPDX-License-Identifier: Apache-2.0
// Process plumbing of the lab, for what Python can't do cheaply or safely (fork between setns and exec):
//   labrun init                                      pid 1 of a node: reaps
//   labrun enter OPTIONS -- CMD...                   runs CMD in the namespaces of another process
//   labrun shim OPTIONS -- CMD...                    parent of one container: outlives the runner, keeps the exit status
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_BINDS = 32, EXIT_SETUP = 125, EXIT_NOT_RUNNABLE = 126, EXIT_NOT_FOUND = 127 };

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *fmt, ...)
{
	int err = errno;
	va_list ap;
	fputs("labrun: ", stderr);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr, ": %s\n", strerror(err));
	_exit(EXIT_SETUP);
}

static void write_text(int dirfd, const char *path, const char *text)
{
	int fd = openat(dirfd, path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text))
		die("cannot write %s", path);
	close(fd);
}

static void join_cgroup(const char *dir)
{
	char path[PATH_MAX];
	snprintf(path, sizeof path, "%s/cgroup.procs", dir);
	write_text(AT_FDCWD, path, "0");
}

static void redirect_output(const char *log)
{
	int in = open("/dev/null", O_RDONLY), out = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);
	if (in < 0 || out < 0)
		die("cannot open %s", log);
	if (dup2(in, 0) < 0 || dup2(out, 1) < 0 || dup2(out, 2) < 0)
		die("dup2");
	if (in > 2)
		close(in);
	if (out > 2)
		close(out);
}

__attribute__((noreturn)) static void run(char **argv)
{
	execvp(argv[0], argv);
	int err = errno;
	fprintf(stderr, "labrun: cannot run %s: %s\n", argv[0], strerror(err));
	_exit(err == ENOENT ? EXIT_NOT_FOUND : EXIT_NOT_RUNNABLE);
}

static int exit_code(int status)
{
	return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

// ---- init ------------------------------------------------------------------------------------------------------

static int cmd_init(void)
{
	sigset_t all;
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, NULL);
	for (;;) {
		int sig = 0;
		sigwait(&all, &sig);
		if (sig == SIGTERM || sig == SIGINT)
			return 0; // the kernel kills the rest of the pid namespace
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
}

// ---- enter -----------------------------------------------------------------------------------------------------

static void enter_namespace(const char *path, int type)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || setns(fd, type) < 0)
		die("cannot enter %s", path);
	close(fd);
}

static int open_namespace(const char *target, const char *name)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/%s/ns/%s", target, name);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		die("process %s is gone", target);
	return fd;
}

static void enter_target(const char *target)
{
	// all are opened first: after the mount namespace is changed, /proc is another one
	static const struct { const char *name; int type; } kinds[] = {
		{"net", CLONE_NEWNET}, {"uts", CLONE_NEWUTS}, {"pid", CLONE_NEWPID}, {"mnt", CLONE_NEWNS}};
	int fds[4];
	for (int i = 0; i < 4; i++)
		fds[i] = open_namespace(target, kinds[i].name);
	for (int i = 0; i < 4; i++)
		if (setns(fds[i], kinds[i].type) < 0)
			die("cannot enter the %s namespace of process %s", kinds[i].name, target);
	if (chdir("/") < 0)
		die("chdir");
}

static void copy_number(char *to, size_t size, int procfd, const char *link)
{
	ssize_t n = readlinkat(procfd, link, to, size - 2);
	if (n < 0)
		die("readlink %s", link);
	to[n] = '\n';
	to[n + 1] = 0;
}

// The grandchild is adopted by the pid namespace's own init, and says its number as the caller sees it.
static int detach(int procfd, const char *log, char **argv)
{
	int report[2];
	if (pipe2(report, O_CLOEXEC) < 0)
		die("pipe");
	pid_t child = fork();
	if (child < 0)
		die("fork");
	if (child == 0) {
		pid_t grandchild = fork();
		if (grandchild < 0)
			die("fork");
		if (grandchild > 0)
			_exit(0);
		char self[32];
		setsid();
		copy_number(self, sizeof self, procfd, "self");
		if (write(report[1], self, strlen(self)) < 0)
			die("write");
		redirect_output(log);
		run(argv);
	}
	close(report[1]);
	int status;
	char self[32];
	waitpid(child, &status, 0);
	ssize_t n = read(report[0], self, sizeof self);
	if (n <= 0)
		return EXIT_SETUP;
	return write(1, self, (size_t)n) == n ? 0 : EXIT_SETUP;
}

static pid_t foreground_child;

static void forward_signal(int sig)
{
	if (foreground_child > 0)
		kill(foreground_child, sig);
}

static int foreground(char **argv)
{
	foreground_child = fork();
	if (foreground_child < 0)
		die("fork");
	if (foreground_child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		run(argv);
	}
	signal(SIGTERM, forward_signal);
	signal(SIGHUP, forward_signal);
	signal(SIGINT, SIG_IGN); // the terminal sends it to the child as well
	int status;
	while (waitpid(foreground_child, &status, 0) < 0 && errno == EINTR)
		;
	return exit_code(status);
}

static int cmd_enter(int argc, char **argv)
{
	static const struct option options[] = {{"target", 1, 0, 't'}, {"netns", 1, 0, 'n'}, {"cgroup", 1, 0, 'c'},
						{"detach-log", 1, 0, 'l'}, {0, 0, 0, 0}};
	const char *target = NULL, *netns = NULL, *log = NULL;
	int opt;
	while ((opt = getopt_long(argc, argv, "+", options, NULL)) != -1) {
		switch (opt) {
		case 't': target = optarg; break;
		case 'n': netns = optarg; break;
		case 'c': join_cgroup(optarg); break;
		case 'l': log = optarg; break;
		default: return EXIT_SETUP;
		}
	}
	if (optind >= argc) {
		fputs("labrun enter: no command\n", stderr);
		return EXIT_SETUP;
	}
	int procfd = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (procfd < 0)
		die("/proc");
	if (target)
		enter_target(target);
	if (netns)
		enter_namespace(netns, CLONE_NEWNET);
	return log ? detach(procfd, log, argv + optind) : foreground(argv + optind);
}

// ---- shim ------------------------------------------------------------------------------------------------------

struct shim {
	const char *dir, *netns, *hostname, *cgroup, *log, *cwd;
	char *binds[MAX_BINDS]; // SOURCE:TARGET
	int nbinds;
};

static unsigned long long start_time(void)
{
	char text[1024];
	int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
	if (n < 0)
		die("/proc/self/stat");
	close(fd);
	text[n] = 0;
	char *p = strrchr(text, ')'); // field 2 may hold spaces; start time is field 22
	for (int field = 2; p && field < 22; field++)
		p = strchr(p + 1, ' ');
	return p ? strtoull(p + 1, NULL, 10) : 0;
}

__attribute__((format(printf, 3, 4))) static void record(const char *dir, const char *name, const char *fmt, ...)
{
	char tmp[PATH_MAX], path[PATH_MAX];
	va_list ap;
	snprintf(tmp, sizeof tmp, "%s/.%s", dir, name);
	snprintf(path, sizeof path, "%s/%s", dir, name);
	int fd = open(tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0)
		die("cannot write %s", tmp);
	va_start(ap, fmt);
	vdprintf(fd, fmt, ap);
	va_end(ap);
	close(fd);
	if (rename(tmp, path) < 0)
		die("cannot write %s", path);
}

static void bind_files(struct shim *s)
{
	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
		die("private mounts");
	for (int i = 0; i < s->nbinds; i++) {
		char *target = strchr(s->binds[i], ':');
		if (!target) {
			errno = EINVAL;
			die("bind %s", s->binds[i]);
		}
		*target++ = 0;
		if (mount(s->binds[i], target, NULL, MS_BIND, NULL) < 0)
			die("cannot mount %s on %s", s->binds[i], target);
	}
}

__attribute__((noreturn)) static void container(struct shim *s, char **argv)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0)
		die("cannot mount /proc");
	if (setsid() < 0 && errno != EPERM)
		die("setsid");
	if (s->cwd && chdir(s->cwd) < 0)
		die("cannot change to %s", s->cwd);
	run(argv);
}

static void shim_options(struct shim *s, int argc, char **argv)
{
	static const struct option options[] = {
		{"dir", 1, 0, 'd'}, {"netns", 1, 0, 'n'}, {"hostname", 1, 0, 'h'}, {"cgroup", 1, 0, 'c'},
		{"log", 1, 0, 'l'}, {"bind", 1, 0, 'b'}, {"cwd", 1, 0, 'w'}, {0, 0, 0, 0}};
	int opt;
	while ((opt = getopt_long(argc, argv, "+", options, NULL)) != -1) {
		switch (opt) {
		case 'd': s->dir = optarg; break;
		case 'n': s->netns = optarg; break;
		case 'h': s->hostname = optarg; break;
		case 'c': s->cgroup = optarg; break;
		case 'l': s->log = optarg; break;
		case 'w': s->cwd = optarg; break;
		case 'b':
			if (s->nbinds == MAX_BINDS)
				exit(EXIT_SETUP);
			s->binds[s->nbinds++] = optarg;
			break;
		default: exit(EXIT_SETUP);
		}
	}
	if (!s->dir || !s->log || !s->cgroup || optind >= argc) {
		fputs("labrun shim: --dir, --log, --cgroup and a command are needed\n", stderr);
		exit(EXIT_SETUP);
	}
}

static int cmd_shim(int argc, char **argv)
{
	struct shim s = {0};
	shim_options(&s, argc, argv);
	setsid();
	redirect_output(s.log);
	record(s.dir, "shim", "%d %llu\n", getpid(), start_time());
	join_cgroup(s.cgroup);
	if (s.netns)
		enter_namespace(s.netns, CLONE_NEWNET);
	if (unshare(CLONE_NEWNS | CLONE_NEWPID | (s.hostname ? CLONE_NEWUTS : 0)) < 0)
		die("unshare");
	if (s.hostname && sethostname(s.hostname, strlen(s.hostname)) < 0)
		die("sethostname");
	bind_files(&s);
	pid_t child = fork();
	if (child < 0)
		die("fork");
	if (child == 0)
		container(&s, argv + optind);
	record(s.dir, "pid", "%d\n", child);
	signal(SIGTERM, SIG_IGN); // the runner signals the container itself; the shim stays to see how it ends
	signal(SIGHUP, SIG_IGN);
	int status;
	while (waitpid(child, &status, 0) < 0 && errno == EINTR)
		;
	record(s.dir, "exit", "%d\n", exit_code(status));
	return 0;
}

int main(int argc, char **argv)
{
	if (argc >= 2 && !strcmp(argv[1], "init"))
		return cmd_init();
	if (argc >= 2 && !strcmp(argv[1], "enter"))
		return cmd_enter(argc - 1, argv + 1);
	if (argc >= 2 && !strcmp(argv[1], "shim"))
		return cmd_shim(argc - 1, argv + 1);
	fputs("usage: labrun init | enter OPTIONS -- CMD | shim OPTIONS -- CMD\n", stderr);
	return 2;
}
