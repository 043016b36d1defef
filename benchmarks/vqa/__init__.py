"""The paper's four benchmarks, from local folders: `python -m benchmarks.vqa --help`."""
