"""Drawing what an evaluation draws, to measure it again by hand."""

from stepdistill.eval.measure.draws import draw_batch, select_conditions, split_into_batches


def draw_all(stock, steps, guidance, protocol, prompts=None):
    """Batches of (pixels (B, C, H, W) in [0, 1], their conditions), ``protocol.samples`` in all, of its first seed."""
    for batch, indices in enumerate(split_into_batches(protocol.samples, protocol.batch_size)):
        conditions = select_conditions(stock, indices, prompts, protocol.labels)
        yield draw_batch(stock, steps, guidance, conditions, len(indices), protocol.seed, batch), conditions
