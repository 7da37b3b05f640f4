"""`shoal dash`: one page over the run folders, read only.

server.py     routes, answers, how it is started          security.py   who may ask, and what a browser may run
folders.py    which folder a run's name means             metrics.py    metrics.jsonl in columns, thinned series
database.py   trajectories.db and ledger.sqlite           stream.py     new lines as server-sent events
processes.py  workers, logs, spans                        span_trace.py all spans, for Perfetto
static/       the page: plain modules, no build step
"""
