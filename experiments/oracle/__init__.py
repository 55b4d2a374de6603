"""Each filter removed alone, and how well scores foresee what that costs."""
