"""What an NVIDIA GPU does with compressed caches. The command and its options: `__main__.py`."""
