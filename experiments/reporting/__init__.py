"""The pages of runs: cards, charts, sections, one page per run and one for several."""
