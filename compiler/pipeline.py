from __future__ import annotations


def run_graph_passes(gm, example_inputs, settings, report):
    return gm
def run_module_passes(model, example, settings, report):
    return model
