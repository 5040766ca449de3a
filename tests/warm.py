"""Imported once by the process that ranks are forked from: all that a rank would otherwise do anew when it starts.

Hydra's grammar is compiled while the first override is read, templates of reports with the first report. And what is
frozen here is no garbage that a rank looks through when it ends, for which the system would copy every page of it.
While it is imported nothing of it is garbage, which looking through it again and again would not find out.
"""

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
composing = importlib.import_module("tests.composing")
composing.parse_once()
composing.values_last()
composing.compose_once()
composing.check_no_export()
importlib.import_module("tessera.ctr.config").load_config(["trainer.run_dir=/nowhere/a run"], "")
templates = importlib.import_module("tessera.ctr.report.page")._templates()
for name in templates.list_templates(["html"]):
    templates.get_template(name)
gc.collect()
gc.freeze()
gc.enable()
gc.set_threshold(10_000, 20, 20)  # a small job ends before it has much
