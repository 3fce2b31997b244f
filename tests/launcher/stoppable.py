"""A rank that works until it is asked to stop, saves for a moment and leaves with 85; or ends as its argument says.

Writes `<rank>.pid` once it listens and `<rank>.saved` when it has been asked.
"""

import os
import signal
import sys
import time
from pathlib import Path

_flag = []


def main(out: Path, way: str) -> int:
    rank = os.environ.get("RANK", "0")
    if way != "deaf":
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: _flag.append(number))
    (out / f"{rank}.pid").write_text(str(os.getpid()))
    if way.startswith("exit-"):
        return int(way.removeprefix("exit-"))
    deadline_s = time.monotonic() + 60
    while not _flag and time.monotonic() < deadline_s:
        time.sleep(0.05)
    time.sleep(1.0)
    (out / f"{rank}.saved").write_text(",".join(map(str, _flag)))
    return 85


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    sys.exit(main(Path(words[0]), words[1]))
