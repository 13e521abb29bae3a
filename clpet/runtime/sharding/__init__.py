"""Sharded training: the weights of a network are divided among the ranks (FSDP2), and everything made from them too.

All that clpet must know of FSDP2 and DTensor is in this package. A sharded tensor is a DTensor: every rank holds some
of its rows, divided as by torch.chunk. With R replicas (HSDP) the ranks are R groups, each with all
rows. FSDP gathers the rows of a block for its forward and its backward pass, and sums the gradients over all ranks;
outside of these passes every rank sees and updates its own rows only.

A method that works on weights applies its equation to the rows of a rank, with functions of `tensors`:
    local(theta)                    the rows of this rank as a plain tensor; gradients flow back to theta
    sums([(theta, x), ...])         sums of values x computed from local rows, over the rows of all ranks
    wrap(rows, theta)               rows computed from those of theta, as a sharded tensor: checkpoints can store it
    aligned(value, theta)           a value of any layout as rows of theta's
Without sharding these return what they get, and nothing is communicated.
"""
