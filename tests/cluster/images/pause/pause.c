// SPDX-License-Identifier: Apache-2.0
// Holds a pod's namespaces: sleeps until told to end and, as pid 1 of a shared pid namespace, collects who ended.
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void on_end(int number) {
  (void)number;
  _exit(0);
}

static void on_child(int number) {
  (void)number;
  while (waitpid(-1, NULL, WNOHANG) > 0) {
  }
}

int main(int argc, char **argv) {
  if (argc > 1 && strcmp(argv[1], "-v") == 0) return puts("pause for Fimbria's tests") < 0;
  struct sigaction end = {.sa_handler = on_end}, child = {.sa_handler = on_child, .sa_flags = SA_NOCLDSTOP};
  if (sigaction(SIGINT, &end, NULL) || sigaction(SIGTERM, &end, NULL) || sigaction(SIGCHLD, &child, NULL)) {
    perror("pause: sigaction");
    return 1;
  }
  for (;;) pause();
}
