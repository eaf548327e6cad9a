"""What ``scripts/bench.py`` is made of: devices and how they time, sections, bars, and how a run is shown."""
