# Variables of every Ray process of a cluster; to be sourced before `ray start`. Those of Serve's ingress are
# RESILIENCE in cluster/ingress.py, and cluster/kuberay/base/node-env.yaml holds the same: a test compares all three.

# Nobody speaks to Ray without the token, and Ray does not start without one.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-/home/ray/secrets/token}"
export RAY_USAGE_STATS_ENABLED=0
# A lost node is noticed after seconds; by default a run waits for more than a minute.
export RAY_health_check_initial_delay_ms=1000
export RAY_health_check_period_ms=500
export RAY_health_check_timeout_ms=1000
export RAY_health_check_failure_threshold=3
# `ray job stop` gives training the time to write a checkpoint.
export RAY_JOB_STOP_WAIT_TIME_S=60
export RAY_SERVE_ENABLE_HA_PROXY=1
export RAY_SERVE_THROUGHPUT_OPTIMIZED=1
export RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=5
export RAY_SERVE_HAPROXY_RETRY_ON='conn-failure empty-response
    option http-buffer-request
    timeout http-request 60s'
export RAY_SERVE_HAPROXY_RETRIES=5
export RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT=1
export RAY_SERVE_HAPROXY_TUNE_BUFSIZE=131072
export RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=3600
export RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S=60
