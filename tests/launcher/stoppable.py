"""A rank that works until it is asked to stop, saves for a moment and leaves with 85; or ends as its argument says.

One that nobody asks gives up after a minute, and saves nothing.

"twice": it works as long as no rank has been killed (`killed` is there), and has nothing left to do after that.

Writes `<rank>.pid` once it listens and `<rank>.saved` when it has been asked.
"""

import os
import sys
import time
from pathlib import Path

from launcher.supervise import StopFlag


def main(out: Path, way: str) -> int:
    rank = os.environ.get("RANK", "0")
    flag = None if way == "deaf" else StopFlag()
    (out / f"{rank}.new").write_text(str(os.getpid()))
    (out / f"{rank}.new").rename(out / f"{rank}.pid")
    if way.startswith("exit-"):
        return int(way.removeprefix("exit-"))
    if way == "twice" and (out / "killed").exists():
        return 0
    deadline_s = time.monotonic() + 60
    while not (flag and flag.raised) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    if flag and not flag.raised:
        return 3  # nobody has asked
    time.sleep(0.3)
    (out / f"{rank}.saved").touch()
    if flag:
        flag.leave()
    if way == "linger":
        time.sleep(1.5)
    return 85


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    sys.exit(main(Path(words[0]), words[1]))
