"""The thin layer over the kernel: BPF objects, maps and links, netlink, namespaces, BTF. It decides nothing."""
