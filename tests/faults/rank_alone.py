"""One rank as the project's launcher starts it, a fresh Python, with the fault of $RANK_FAULT
waiting in the rank that it names."""

import json
import os

from rank_faults import arm

from qwen_lora.cli import main

fault = json.loads(os.environ["RANK_FAULT"])
if fault.pop("rank") == int(os.environ["RANK"]):
    arm(**fault)
main()
