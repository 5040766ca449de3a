"""Imported once by the process that ranks are forked from: all that a rank would otherwise do anew when it starts.

Hydra's grammar is compiled while the first override is read, templates of reports with the first report. And what is
frozen here is no garbage that a rank looks through when it ends, for which the system would copy every page of it.
While it is imported nothing of it is garbage, which looking through it again and again would not find out.
"""

import functools
import gc
import importlib

gc.disable()
for name in (
    "tessera.ctr.daily.loop",
    "tessera.ctr.models.deepfm",
    "tessera.ctr.train.trainer",
    "torch.distributed.run",
):
    importlib.import_module(name)
importlib.import_module("tests.composing").compose_with_less_work()
importlib.import_module("tessera.ctr.config").load_config(["trainer.run_dir=/nowhere/a run"], "")
templates = importlib.import_module("tessera.ctr.report.page")._templates()
for name in templates.list_templates(["html"]):
    templates.get_template(name)
# Versions of packages, which each job writes down, are looked for in all that is installed.
metadata = importlib.import_module("importlib.metadata")
metadata.version = functools.cache(metadata.version)
importlib.import_module("tessera.ctr.runs.log").versions()
gc.collect()
gc.freeze()
gc.enable()
gc.set_threshold(10_000, 20, 20)  # a small job ends before it has much
