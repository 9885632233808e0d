"""The security and robustness checklist: each item, and the conformance checks that cover it on every kind of box."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sandbox import conformance as basic
from sandbox import conformance_agent as driven
from sandbox import conformance_escape as escape
from sandbox import conformance_files as files
from sandbox import conformance_life as life
from sandbox import conformance_limits as limits

Checks = tuple[Callable[..., Any], ...]

CHECKLIST: Mapping[int, tuple[str, Checks]] = {
    # Resources
    1: ("fork bomb, static and spinning", (basic.processes_are_bounded,)),
    2: ("thread bomb", (limits.threads_are_bounded,)),
    3: (
        "memory hog, and many small ones; the agent survives",
        (basic.memory_is_bounded, limits.many_small_processes_are_one_big_one),
    ),
    4: ("a full tmpfs is bounded as memory is", (basic.disk_is_bounded, limits.many_small_processes_are_one_big_one)),
    5: (
        "full disk, many inodes, sparse files, deep trees, long names",
        (basic.disk_is_bounded, limits.files_are_bounded),
    ),
    6: ("CPU spin; a neighbour's latency", (basic.cpu_is_bounded, limits.neighbours_stay_quick)),
    7: ("exhausted descriptors", (limits.descriptors_and_kernel_objects_are_bounded,)),
    8: (
        "exhausted pipes, sockets, epoll, inotify, timers, shared memory, queues",
        (limits.descriptors_and_kernel_objects_are_bounded, limits.pipes_full_of_data_are_memory),
    ),
    9: (
        "output flood on both streams, with and without newlines",
        (basic.output_is_capped, limits.floods_and_odd_output_are_kept_in_bounds),
    ),
    10: ("output after close; bytes that are no text", (limits.floods_and_odd_output_are_kept_in_bounds,)),
    11: ("flood of the engine's log", (limits.floods_and_odd_output_are_kept_in_bounds,)),
    12: ("core dump; file size limit", (limits.dumps_and_big_files_are_refused,)),
    13: ("input nobody reads, huge input, arguments and environment", (limits.input_is_bounded,)),
    # Time and kill
    14: ("plain sleep", (basic.timeout_kills_the_tree,)),
    15: ("deaf to signals", (basic.timeout_kills_the_tree, limits.stubborn_processes_die)),
    16: ("a daemon does not survive", (basic.timeout_kills_the_tree, limits.stubborn_processes_die)),
    17: ("closes its output and sleeps", (limits.floods_and_odd_output_are_kept_in_bounds,)),
    18: ("a background child that holds the output", (basic.background_child_does_not_block,)),
    19: ("stopped, traced, lent its memory", (limits.stubborn_processes_die,)),
    20: ("zombies are reaped", (limits.stubborn_processes_die,)),
    21: ("cancelled by the client; partial output is kept", (basic.cancelling_kills, basic.timeout_kills_the_tree)),
    22: ("the clock cannot be set", (escape.namespaces_and_rights_cannot_be_had,)),
    23: ("kill -9 1", (basic.agent_is_out_of_reach, escape.nobody_can_be_traced)),
    # Isolation
    24: ("ids, capabilities, no-new-privileges, filter", (basic.root_is_read_only, escape.every_way_in_drops_rights)),
    25: (
        "the root file system, preloads, start-up files",
        (
            basic.root_is_read_only,
            escape.kernel_and_host_files_are_out_of_reach,
            life.a_poisoned_home_reaches_no_later_command,
        ),
    ),
    26: ("set-uid files and file capabilities", (escape.set_uid_files_gain_nothing,)),
    27: ("mounts, namespaces, chroot", (escape.namespaces_and_rights_cannot_be_had,)),
    28: ("tracing, memory and descriptors of others", (basic.agent_is_out_of_reach, escape.nobody_can_be_traced)),
    29: ("forged frames", (basic.agent_is_out_of_reach, driven.calls_are_apart)),
    30: ("network and sockets of every family", (basic.no_network, escape.the_network_is_out_of_reach)),
    31: ("kernel files", (escape.kernel_and_host_files_are_out_of_reach,)),
    32: ("devices", (escape.kernel_and_host_files_are_out_of_reach,)),
    33: ("keyrings, System V objects, /dev/shm and locks between boxes", (escape.two_boxes_are_apart,)),
    34: ("forged terminal input, escapes", (escape.a_terminal_gives_nothing_away,)),
    35: ("32-bit system calls", (escape.old_and_odd_interfaces_are_closed,)),
    36: ("ioctls of file systems", (escape.old_and_odd_interfaces_are_closed,)),
    37: ("reuse across users", (life.nothing_is_left_for_the_next_box, driven.calls_are_apart)),
    38: ("paths, sockets and secrets of the host", (escape.kernel_and_host_files_are_out_of_reach,)),
    39: (
        "rights stay dropped on every way in, in restored and resumed boxes",
        (escape.every_way_in_drops_rights, driven.calls_are_apart, life.a_restored_box_is_like_any_other),
    ),
    # Files
    40: (
        "links, and directories swapped for links",
        (basic.links_are_not_followed, files.a_swapped_directory_leads_nowhere),
    ),
    41: ("names", (basic.links_are_not_followed, files.names_are_taken_as_they_are)),
    42: (
        "what is no file, is endless or grows",
        (files.what_is_no_plain_file_is_not_read, files.a_growing_file_is_read_up_to_a_cap),
    ),
    43: (
        "archives with links, devices, odd names",
        (driven.bad_archives_are_refused, files.archives_that_lie_are_refused),
    ),
    44: ("bombs", (driven.bad_archives_are_refused, files.archives_that_lie_are_refused)),
    45: ("large directories, loops of links", (driven.trees_go_in_and_out, files.loops_and_crowds_are_listed_in_time)),
    46: ("writes are whole or not at all", (basic.disk_is_bounded, files.a_write_is_whole_or_not_at_all)),
    47: ("modes and owners behind links", (files.links_keep_what_they_point_to,)),
    # Faults
    55: ("a poisoned pool", (life.a_dead_box_is_not_handed_out, driven.a_call_that_spoils_its_box_is_noticed)),
    56: ("a storm of 32 boxes", (life.a_storm_of_boxes_is_weathered,)),
    57: ("snapshots during writes, restored twice", (life.a_restored_box_is_like_any_other,)),
    58: ("an agent that hangs", (life.an_agent_that_hangs_is_lost,)),
    # Shell session
    59: ("a forged end of a command", (driven.a_session_is_not_fooled,)),
    60: ("exit, exec, traps, prompts, open quotes", (driven.a_session_is_not_fooled, driven.a_session_ends_as_it_says)),
    61: (
        "interactive programs, Ctrl-C, output while idle",
        (driven.a_terminal_is_one, driven.a_terminal_interrupts, driven.a_session_survives_its_commands),
    ),
    62: ("overwritten shells and builtins", (life.a_poisoned_home_reaches_no_later_command, basic.root_is_read_only)),
}

ELSEWHERE: Mapping[int, str] = {
    48: "losing the agent: a_lost_box_is_not_a_result, and the tests of the edge",
    49: "a container removed from outside: the tests of the edge",
    50: "a daemon that stops, hangs or restarts: the tests of the container substrate",
    51: "an edge that is killed, a torn log: the tests of the edge and the log",
    52: "a client that is preempted: the tests of recorded boxes",
    53: "duplicate and stale requests: the tests of recorded boxes and the edge",
    54: "leases, orphans and leaks: the tests of the edge and of each substrate",
}
"""Items that are not about one open box, and why no check here covers them."""
