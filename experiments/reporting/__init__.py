"""The pages of runs: cards, charts, sections, one page a run and one for several."""
