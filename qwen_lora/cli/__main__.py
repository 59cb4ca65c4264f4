"""`python -m qwen_lora.cli`, which is how `--num-processes` starts its ranks."""

from qwen_lora.cli import main

main()
