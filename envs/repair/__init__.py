"""Closed-form repair of a cut network: dropped channels expressed by kept ones, layers regressed again."""
