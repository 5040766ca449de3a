"""Tessera: training of click-through-rate models on sharded embedding tables."""

import os

# Ranks share cores with each other and with decoding threads; OpenMP workers that spin while they wait
# take those cores away (30 times slower steps were measured on two contended cores). OpenMP reads this as it loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
