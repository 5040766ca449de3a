"""What docs/claims.md says around its tables."""

from __future__ import annotations

from tessera.scripts.bench.claims.page import System

HEADING = """# Claims

What the papers of the eight systems claim, each shown by a command on data at hand:

```sh
make claims DATA=FOLDER                    # FOLDER holds the small logs: ml-100k, ml-100k-random
python -m tessera.scripts.bench.claims --only PNN --seeds 4 5 6
```

This page is what the command writes. Results lie in `build/bench/claims`, one file per fit; a run that was
stopped goes on with what is missing, and a claim whose fits are missing says "not run".

**How to read the tables.** *Difference* is the mean of the differences seed by seed, ± half of their 95 %
interval (Student's t; with three seeds 2.5 times their standard deviation), and each of them in brackets. A
claim *holds* if the whole interval is on its side; "near" means that the whole interval is above -0.001. With
three seeds an interval is wide: "in every seed" is what three differences of one sign with a wide interval
are called.

**How both sides are treated.** They have the same data, the same widths (MLP 64-32, vectors of 8) unless a
table says otherwise, the same passes at most (the best one on the valid split counts), Adam for dense weights
and rows, and the same budget of tuning: the learning rate of rows is 0.003 or 0.01, what is better on the
valid split of seed 0. AUC is that of the test split. Synthetic rows are drawn anew for each seed, truth and
all, so that the interval is also one over truths; MovieLens-100k (random 8:1:1 split) is the same for all
seeds. The figures of papers are of other data, many times larger: they say what is claimed, not what is to be
expected here.

**What was changed after first rounds.** The synthetic sets of the towers had 60,000 rows, batches of 1,024 and
six or eight passes, that is 250 to 330 steps, and training ended with the first pass that was no better.
AutoInt stopped at a plateau there, deep models used up their passes, and FGCNN had found its interactions with
one of three seeds. So these sets now have 120,000 rows (84,000 for training), batches of 512, 30 passes at most
and a patience of three, the same for all models; the rate of dense weights was taken per set, 0.003 or 0.001,
by valid curves of seed 0. No setting was chosen by a test split. Below each table stands how many fits used
all of their passes all the same.

**Synthetic truths.** `scripts/bench/claims/teachers.py` draws rows whose logit has parts in chosen shares of
its variance: *first* (a weight per id), *pairs* (inner products, what a factorization machine says), *own*
(of each pair of fields a cosine with directions, frequency and phase of its own), *steps* (of each pair which of
two ids is ahead along directions of its own, less what either says alone), *neighbours* and *far*
(products of three signs, of neighbouring fields or of fields far from each other; two of the three say
nothing). Where a method is for interactions that a truth has to have, the truth was made to have them, and
the table says which."""

SYSTEMS = {
    "DeepFM": System(
        "DeepFM (1703.04247)",
        """A factorization machine and an MLP on the same vectors, above either alone and above Wide&Deep. *Low and high
orders*: a truth of first order (0.3 of the variance), inner products (0.35) and other interactions of pairs
(0.35). DNN is `model=dnn`. FNN begins with the rows of a trained FM: `model=wide_deep` by
`trainer.warm_start`, so that first-order weights are taken over too; its FM has as many passes of its
own, which DeepFM does not need where it stopped by itself. The paper's differences are those of its Criteo
table (arXiv version).""",
    ),
    "AutoInt": System(
        "AutoInt (1810.11921)",
        """Self-attention over fields, two layers of width 32. The residual is a projection of each layer's input
(`model.residual`). *Low and high orders* is the truth of the table above; there both forms of AutoInt have
rows at 0.01, untuned, because they take many times as long as the others. AutoInt's loss stays on a plateau for
hundreds of steps before it falls, which is why shorter training had it far behind. The paper's differences are
those of MovieLens-1M and Criteo.""",
    ),
    "PNN": System(
        "PNN: IPNN, OPNN, KPNN, PIN (1611.00144, 1807.00311)",
        """Products of pairs beside vectors (IPNN: inner, OPNN: outer, KPNN: with a matrix per pair) or a net per pair
(PIN) before an MLP. *Pairs in ways of their own*: a truth of 10 fields, first order (0.2) and the *own* part
(0.8), made for this comparison. The paper's tables are not quoted here; the order is what it claims. On
MovieLens-100k, which has 8 fields and few rows, PIN is below IPNN ([figures](models.md#figures)).

Whether PIN or KPNN is ahead depends on the truth and on the steps. A cosine of a difference is the sum of two
products, which is what KPNN's matrices say; with few steps PIN was ahead nevertheless (84,000 training rows, all
rates 0.001, eight passes, one seed: PIN 0.8035, KPNN 0.8015), and trained to their ends KPNN is. Looks at valid of
seed 0, which this command does not repeat: KPNN 0.8116, PIN 0.8061, PIN with nets of 40-5 instead of 20-1 0.8056;
with vectors of 4 KPNN 0.8039, PIN 0.8028; with cosines twice as fast KPNN 0.7870, PIN 0.7769. *Steps of pairs* has
the *steps* part in the place of *own*, a relation of two ids that takes many products, where a net per pair has
something to add: KPNN 0.7577, PIN 0.7597 in the same look.""",
    ),
    "FGCNN": System(
        "FGCNN (1904.04447)",
        """New features, generated by convolutions over neighbouring fields, join the raw ones in an IPNN of the same
width. *Neighbours*: a truth of first order (0.2), inner products (0.3) and products of three neighbouring
fields (0.5), made for this comparison. *Far fields* is the control: the same, but the three fields are far
from each other. On MovieLens-100k FGCNN is below IPNN ([figures](models.md#figures)).""",
    ),
    "ALPT": System(
        "LPT and ALPT (2212.05735)",
        """DeepFM whose rows are stored as integers of 8 or 4 bits, without a copy in float32. All have Adam at 0.001.
*As Criteo*: Criteo-shaped synthetic rows, two passes at most. int8 has the default range of 0.3, untuned. Of
int4, LPT has the better of the ranges 0.1 and 0.3 on valid, ALPT begins with 0.1 and has the better of two
rates of its scales, 2e-5 and 1e-3. More formats and MovieLens: [low precision](low_precision.md#figures).""",
    ),
    "Monolith": System(
        "Monolith (2209.07663)",
        """A row for every id beside ids taken modulo a quarter of a feature's ids; rows that expire after 3 days
without use beside rows that stay, on days each of which brings 12 % new ids; and a model that goes on learning while
a stream goes by, in 10, 50 or 100 pieces, each scored before it is learnt. Days and streams have row-wise
Adagrad, with the rates that `scripts/bench/daily_methods.py` chose. "Flat" is at most 5 % more rows than five
days before the end.""",
    ),
    "ScaleFreeCTR": System(
        "ScaleFreeCTR (2104.08542)",
        """Tables on the host with a cache of so many rows each, batches of 256, one pass, ids that follow Zipf's law
with the given exponent. Bits are those of all dense weights and of all predictions on the test split. The
share of rows in the cache and the hits are those of the tables that do not fit into it; hits are of rows that
were there before (a new id is in no cache). Speed is not shown: host and device are one memory here
([cache](cache.md)).""",
    ),
    "IncCTR": System(
        "IncCTR (2009.02147)",
        """Each day is scored, then trained on in one pass, by a model that goes on, with or without its former self as
teacher (KD), beside a model trained anew on the 7 days before ([incremental training](incremental.md), which
has KD-batch and MovieLens too). AUC is the mean over the days after the first five. Row-wise Adagrad, with
the rates that `scripts/bench/daily_methods.py` chose.""",
    ),
}
