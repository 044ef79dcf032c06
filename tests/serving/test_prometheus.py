"""The text that Prometheus reads."""

from captioning.serving import prometheus


def test_the_text_format():
    counter = prometheus.Counter("asked_total", "Requests.", ("path", "status"))
    plain = prometheus.Counter("made_total", "Captions.")
    histogram = prometheus.Histogram("seconds", "Of a batch.", (0.1, 1))
    counter.add("/health", 200)
    counter.add("/health", 200)
    plain.add(amount=3)
    for value in (0.05, 0.1, 0.5, 7):
        histogram.see(value)
    gauge = prometheus.Gauge("waiting", "Jobs.", lambda: 2)
    assert prometheus.text([counter, plain, gauge, histogram]).splitlines() == [
        "# HELP asked_total Requests.",
        "# TYPE asked_total counter",
        'asked_total{path="/health",status="200"} 2',
        "# HELP made_total Captions.",
        "# TYPE made_total counter",
        "made_total 3",
        "# HELP waiting Jobs.",
        "# TYPE waiting gauge",
        "waiting 2",
        "# HELP seconds Of a batch.",
        "# TYPE seconds histogram",
        'seconds_bucket{le="0.1"} 2',
        'seconds_bucket{le="1"} 3',
        'seconds_bucket{le="+Inf"} 4',
        "seconds_sum 7.65",
        "seconds_count 4",
    ]
