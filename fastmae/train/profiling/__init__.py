"""Where a step's time goes: traces, stages and kinds of work, throughput of loader and model, bottlenecks."""
