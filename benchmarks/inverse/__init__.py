"""Posterior samplers side by side with deepinv and azula, on problems whose posterior is known exactly.

`make bench-inverse` makes an environment of its own with the peers and runs `python -m benchmarks.inverse`. Every
method gets the same closed-form denoiser, the same operator and the same data. Peers are shown at their defaults and at
the one setting per cell that was best on other problems; ours at their defaults alone.
"""
