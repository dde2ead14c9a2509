"""The demo: a real model, real text, its spectrum, a report."""
