"""What `sampling_study.py` measures, one file a sub-command."""
