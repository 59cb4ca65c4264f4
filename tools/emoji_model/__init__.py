"""How the trained tiny Qwen-Image was made: a VAE and a transformer that draw emoji.

`python -m tools.emoji_model --help`. Every stage is seeded and continues where it stopped.
"""
