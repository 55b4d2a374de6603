"""Filter groups, which can only be cut as a whole: channel labels, rules for operators, finding and verification."""
