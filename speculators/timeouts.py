"""Timeouts, grace periods and polling intervals of the runner, in seconds. Options of a recipe are not among them.

`runner/servers/guard.py` has its own, as it runs in an interpreter that cannot import this package.
"""

MIN_POLL_SECONDS = 0.002
"""Shortest interval at which a run checks its workers: right after an event, so that the next stage starts at once."""
MAX_POLL_SECONDS = 0.05
"""Longest interval at which a run checks its workers: low load while nothing happens."""
WORKER_GRACE_SECONDS = 30.0
"""A worker's time between SIGTERM and SIGKILL, in which it writes a checkpoint."""
JOB_POLL_SECONDS = 0.1
"""Interval at which a cluster job checks its worker, its servers and the runner's lease."""
CLUSTER_QUERY_SECONDS = 0.5
"""Interval at which the runner queries a cluster for a job: a query may be expensive."""
JOB_RESULT_SECONDS = 60.0
"""Time after a remote job's end until its last note must be visible: network file systems delay it."""
HEARTBEAT_SECONDS = 2.0
"""Interval between two heartbeats of a lease."""
LEASE_SECONDS = 60.0
"""Time without a heartbeat after which a holder on another machine counts as dead; 30 heartbeats may be late."""
SERVER_PROBE_SECONDS = 0.2
"""Interval between two health checks of a server that starts."""
HEALTH_CHECK_SECONDS = 5.0
"""Time in which a server has to answer a health check; a busy one needs seconds."""
FIRST_ANSWER_SECONDS = 600.0
"""Time in which a new server has to answer its first request, which may compile kernels."""
SERVER_STOP_POLL_SECONDS = 0.02
"""Interval between two checks whether a stopping server is gone."""
SERVER_GRACE_SECONDS = 10.0
"""A server's time between SIGTERM and SIGKILL."""
SERVER_DEATH_SECONDS = 3.0
"""Time in which a server that a worker cannot reach may turn out dead: its guard first ends the rest of its tree."""
