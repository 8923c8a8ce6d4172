"""Everything about BPF objects, maps, links and probes, under one name."""

from fimbria.kernel.fd import BpfError, Fd, open_pin, pin_fd, unpin
from fimbria.kernel.links import (
    Anchor,
    Attached,
    AttachType,
    HookState,
    Link,
    LinkInfo,
    ProgInfo,
    ProgType,
    TcSlot,
    TestRun,
    attach_cgroup,
    attach_netns,
    attach_tcx,
    attach_xdp,
    clsact,
    link_ids,
    map_ids,
    prog_info,
    prog_test_run,
    program_by_id,
    program_ids,
    query_cgroup,
    query_device,
    tc_attach,
    tc_detach,
    tc_query,
)
from fimbria.kernel.maps import (
    Map,
    MapBtf,
    MapError,
    MapFlag,
    MapFull,
    MapInfo,
    MapType,
    UpdateFlag,
    array_map,
    array_memory,
    create_map,
    map_info,
    possible_cpus,
)
from fimbria.kernel.objects import BpfObject, ConstantError, MapSpec, Program, ProgramSpec, VerifierError
from fimbria.kernel.ring import RingBuffer

__all__ = [
    "Anchor", "AttachType", "Attached", "BpfError", "BpfObject", "ConstantError", "Fd", "HookState", "Link",
    "LinkInfo", "Map", "MapBtf", "MapError", "MapFlag", "MapFull", "MapInfo", "MapSpec", "MapType", "ProgInfo",
    "ProgType", "Program", "ProgramSpec", "RingBuffer", "TcSlot", "TestRun", "UpdateFlag", "VerifierError",
    "array_map", "array_memory", "attach_cgroup", "attach_netns", "attach_tcx", "attach_xdp", "clsact", "create_map",
    "link_ids", "map_ids",
    "map_info", "open_pin", "pin_fd", "possible_cpus", "prog_info", "prog_test_run", "program_by_id", "program_ids",
    "query_cgroup", "query_device", "tc_attach", "tc_detach", "tc_query", "unpin",
]  # fmt: skip
