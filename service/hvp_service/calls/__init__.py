"""The parts that all calls share: names, pages, refusals, limits, request ids."""
