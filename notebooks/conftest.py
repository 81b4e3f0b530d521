"""nbval compares text; pictures are compared as files, and what libraries print to stderr isn't ours to fix."""


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("image/png", "stderr", "text/html")
