"""A process that has imported what scripts import and forks once for each of them.

Reads a JSON list a line, the script and its arguments; answers with one line: exit status, stdout,
stderr.
"""

from __future__ import annotations

import json
import logging
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path


def run_script(argv: list[str]) -> None:
    """The child's whole life."""
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
    code = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    logging.disable(logging.WARNING)  # what PEFT's import makes bitsandbytes say

    import accelerate  # noqa: F401
    import webdataset  # noqa: F401
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel  # noqa: F401

    import qwen_lora.families.qwen_image.scaled
    import qwen_lora.train.loop
    import qwen_lora.train.run  # noqa: F401

    logging.disable(logging.NOTSET)
    print("ready", flush=True)
    for line in sys.stdin:
        said = [tempfile.TemporaryFile() for _ in range(2)]
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, file in enumerate(said, start=1):
                os.dup2(file.fileno(), number)
            run_script(json.loads(line))
        _, status = os.waitpid(pid, 0)
        texts = []
        for file in said:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        print(json.dumps([os.waitstatus_to_exitcode(status), *texts]), flush=True)


if __name__ == "__main__":
    main()
