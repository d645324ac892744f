"""One command for all benchmarks: lists them, and runs one.

python -m benchmarks [cost|study|break [NAME [--help] [OPTIONS]]]
"""

import sys
from collections.abc import Sequence

from .options import called, parser_of
from .programs import ROOMS, Program, programs_of, summary_of

COMMAND = "python -m benchmarks"
ASKING = ("", "-h", "--help")


def listed(rooms: Sequence[str]) -> str:
    lines = []
    for room in rooms:
        found = programs_of(room)
        width = max(map(len, found))
        lines += [f"{COMMAND} {room} NAME: {summary_of(room)}", *(f"  {name:{width}s}  {one.summary}" for name, one in found.items()), ""]
    return "\n".join([*lines, f"{COMMAND} {rooms[0] if len(rooms) == 1 else 'ROOM'} NAME --help tells more."])


def run(program: Program, words: Sequence[str]) -> int:
    """Networks are small, so one thread is fastest and the same everywhere; beside a GPU costs are those of the machine as it is."""
    import torch

    if program.room == "study" or not torch.cuda.is_available():
        torch.set_num_threads(1)
    main = program.main()
    return called(main, parser_of(main, f"{COMMAND} {program.room} {program.name}", program.told), words) or 0


def main(words: Sequence[str]) -> int:
    room, name = [*words, "", ""][:2]
    programs = programs_of(room) if room in ROOMS else {}
    if name in programs:
        return run(programs[name], words[2:])
    if room in ASKING or (programs and name in ASKING):
        print(listed([room] if room in ROOMS else list(ROOMS)))
        return 0
    print(f"{COMMAND}: there is no {f'{room} {name}'.strip()!r}; there are {', '.join(programs or ROOMS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
