"""Jobs on several nodes: fills in and submits the scripts of ``launch/``."""
