//! What is measured, as Prometheus reads it: OpenMetrics text, on `/metrics` and by `towpathctl metrics`.
//!
//! Names that kube-proxy has are kept with their labels and buckets (kubernetes pkg/proxy/metrics/metrics.go), so that dashboards and
//! alerts made for it go on; what they call a sync is here a generation on its way until it is in force on every worker. Everything
//! else begins with `towpath_`. Counts begin anew when the data plane does.

use std::fmt;
use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text::encode};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter as CountedEvents};
use prometheus_client::metrics::family::Family as Labelled;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets, linear_buckets};
use prometheus_client::registry::Registry;

use super::Shared;
use super::health::update::Update;
use super::health::verdict::Verdict;
use super::health::{DEAD_AFTER_NS, heartbeat_age_ns, monotonic_ns};
use crate::addr::Family;
use crate::stats::{Counter, sum};
use crate::verdict::Reason;

/// Media type of [`text`].
pub const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Name and value of each label of a sample.
type Labels = Vec<(&'static str, String)>;

/// Probes that kube-proxy counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// `/healthz`.
    Healthz,
    /// `/livez`.
    Livez,
}

/// What is measured when it happens; everything else is read when somebody asks.
#[derive(Debug)]
pub struct Metrics {
    sync: Labelled<Labels, Histogram, fn() -> Histogram>,
    programming: Labelled<Labels, Histogram, fn() -> Histogram>,
    healthz: Labelled<Labels, CountedEvents>,
    livez: Labelled<Labels, CountedEvents>,
}

impl Default for Metrics {
    fn default() -> Metrics {
        let metrics = Metrics {
            sync: Labelled::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 2.0, 15))),
            programming: Labelled::new_with_constructor(|| {
                let seconds = linear_buckets(0.25, 0.25, 2)
                    .chain(linear_buckets(1.0, 1.0, 59))
                    .chain(linear_buckets(60.0, 5.0, 12))
                    .chain(linear_buckets(120.0, 30.0, 7));
                Histogram::new(seconds)
            }),
            healthz: Labelled::default(),
            livez: Labelled::default(),
        };
        // From the beginning, so that the first event is a change of a count and not a new one.
        for family in Family::ALL {
            drop(metrics.sync.get_or_create(&ip_family(family)));
            drop(metrics.programming.get_or_create(&ip_family(family)));
        }
        for status in [200, 503] {
            drop(metrics.healthz.get_or_create(&code(status)));
            drop(metrics.livez.get_or_create(&code(status)));
        }
        metrics
    }
}

impl Metrics {
    /// `update` is in force everywhere at `now_ns` (CLOCK_MONOTONIC), which is `now` by the clock of the cluster.
    pub fn observe(&self, update: &Update, now_ns: u64, now: Timestamp) {
        let seconds = now_ns.saturating_sub(update.since_ns) as f64 / 1e9;
        for family in Family::ALL.into_iter().filter(|family| update.families[*family as usize]) {
            self.sync.get_or_create(&ip_family(family)).observe(seconds);
        }
        for (family, triggered) in &update.triggered {
            // Clocks differ: what seems to come from the future took no time.
            let seconds = now.duration_since(*triggered).as_secs_f64().max(0.0);
            self.programming.get_or_create(&ip_family(*family)).observe(seconds);
        }
    }

    /// A probe was answered with `status`.
    pub fn count_probe(&self, probe: Probe, status: u16) {
        let counts = match probe {
            Probe::Healthz => &self.healthz,
            Probe::Livez => &self.livez,
        };
        counts.get_or_create(&code(status)).inc();
    }
}

fn ip_family(family: Family) -> Labels {
    vec![("ip_family", family.name().to_owned())]
}

fn code(status: u16) -> Labels {
    vec![("code", status.to_string())]
}

/// Everything that is measured, in the OpenMetrics text format. Waits for nobody.
pub fn text(shared: &Arc<Shared>) -> String {
    let mut registry = Registry::default();
    let Metrics { sync, programming, healthz, livez } = &shared.metrics;
    registry.register(
        "kubeproxy_sync_proxy_rules_duration_seconds",
        "Time from a change to its being in force on every worker",
        sync.clone(),
    );
    registry.register(
        "kubeproxy_network_programming_duration_seconds",
        "Time from the change of a pod or Service to its being in force on every worker",
        programming.clone(),
    );
    registry.register("kubeproxy_proxy_healthz", "Answers of /healthz by HTTP status", healthz.clone());
    registry.register("kubeproxy_proxy_livez", "Answers of /livez by HTTP status", livez.clone());
    registry.register_collector(Box::new(Live(shared.clone())));
    let mut text = String::new();
    // Writing into a string cannot fail.
    encode(&mut text, &registry).expect("metrics are text");
    text
}

/// What is read when somebody asks.
struct Live(Arc<Shared>);

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Live")
    }
}

impl Collector for Live {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page(encoder);
        gateway(&self.0, &mut page)?;
        services(&self.0, &mut page)?;
        workers(&self.0, &mut page)?;
        packets(&self.0, &mut page)?;
        rings(&self.0, &mut page)
    }
}

/// Metrics are written one after the other.
struct Page<'e>(DescriptorEncoder<'e>);

impl Page<'_> {
    fn write<M: EncodeMetric>(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        samples: Vec<(Labels, M)>,
    ) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, None, kind)?;
        samples.iter().try_for_each(|(labels, value)| value.encode(metric.encode_family(labels)?))
    }

    fn gauges(&mut self, name: &str, help: &str, samples: Vec<(Labels, f64)>) -> fmt::Result {
        let samples = samples.into_iter().map(|(labels, value)| (labels, ConstGauge::new(value))).collect();
        self.write(name, help, MetricType::Gauge, samples)
    }

    /// `name`: without `_total`, which is added.
    fn counters(&mut self, name: &str, help: &str, samples: Vec<(Labels, u64)>) -> fmt::Result {
        let samples = samples.into_iter().map(|(labels, value)| (labels, ConstCounter::new(value))).collect();
        self.write(name, help, MetricType::Counter, samples)
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        let metric = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(value).encode(metric)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let metric = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        ConstCounter::new(value).encode(metric)
    }
}

fn gateway(shared: &Shared, page: &mut Page<'_>) -> fmt::Result {
    let version = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
    page.gauges("towpath_build_info", "Version of the daemon.", vec![(version, 1.0)])?;
    let is_healthy = f64::from(u8::from(Verdict::of(shared).is_healthy()));
    page.gauge("towpath_healthy", "1 if /livez answers 200.", is_healthy)?;
    page.gauge(
        "towpath_problems",
        "Lines of `towpathctl status` that need attention.",
        shared.problems().len() as f64,
    )?;
    let uptime = shared.started.elapsed().as_secs_f64();
    page.gauge("towpath_uptime_seconds", "Time since the data plane started.", uptime)?;
    page.counter(
        "towpath_restarts",
        "Times that the data plane was started again.",
        u64::from(shared.restarts),
    )?;
    let tables = shared.publisher.tables();
    page.gauge("towpath_generation", "Generation of the tables.", tables.generation as f64)?;
    let epoch = f64::from(shared.publisher.fib().epoch);
    page.gauge("towpath_forwarding_epoch", "Epoch of the forwarding table.", epoch)?;
    page.gauge("towpath_frontends", "Addresses and ports that are served.", tables.frontends.len() as f64)?;
    let flows = &shared.flows;
    page.gauge("towpath_flows", "Flows in the table.", flows.len() as f64)?;
    page.gauge(
        "towpath_flows_embryonic",
        "Of them, those not established yet.",
        flows.embryonic_len() as f64,
    )?;
    page.gauge("towpath_flows_capacity", "Flows that fit.", flows.capacity() as f64)?;
    let fib = shared.publisher.fib();
    let up = shared.gateway.ports.iter().enumerate().map(|(index, port)| {
        let is_up = fib.ports.get(index).is_some_and(|link| link.up);
        (vec![("port", port.name.clone())], f64::from(u8::from(is_up)))
    });
    page.gauges("towpath_port_up", "1 if the port has a carrier and is administratively up.", up.collect())
}

fn services(shared: &Shared, page: &mut Page<'_>) -> fmt::Result {
    let health = shared.health.tables();
    let policies = [("internal", health.no_local.internal), ("external", health.no_local.external)];
    let samples = policies.into_iter().flat_map(|(policy, counts)| {
        Family::ALL.into_iter().map(move |family| {
            let labels = [ip_family(family), vec![("traffic_policy", policy.to_owned())]].concat();
            (labels, counts[family as usize] as f64)
        })
    });
    // A gauge with the name of a counter, as in kube-proxy.
    page.gauges(
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
        "Ports of Services with a Local traffic policy and no endpoints.",
        samples.collect(),
    )
}

fn workers(shared: &Shared, page: &mut Page<'_>) -> fmt::Result {
    let now_ns = monotonic_ns();
    let workers = shared.publisher.workers();
    page.gauge("towpath_workers", "Threads that forward.", workers.len() as f64)?;
    let each = |value: &dyn Fn(usize) -> f64| {
        (0..workers.len()).map(|index| (worker(index), value(index))).collect::<Vec<_>>()
    };
    let age_ns = |index: usize| heartbeat_age_ns(&workers[index], now_ns);
    page.gauges(
        "towpath_worker_up",
        "1 if the worker lives.",
        each(&|index| f64::from(u8::from(age_ns(index).is_some_and(|age| age <= DEAD_AFTER_NS)))),
    )?;
    page.gauges(
        "towpath_worker_heartbeat_age_seconds",
        "Time since the worker's last heartbeat.",
        each(&|index| age_ns(index).unwrap_or_default() as f64 / 1e9),
    )?;
    page.gauges(
        "towpath_worker_generation",
        "Generation that the worker has in force.",
        each(&|index| workers[index].in_force() as f64),
    )
}

fn worker(index: usize) -> Labels {
    vec![("worker", index.to_string())]
}

/// Counters that are one metric, told apart by a label: name, help, label, and its value for each.
type Shape = (&'static str, &'static str, &'static str, &'static [(Counter, &'static str)]);

const SHAPES: [Shape; 3] = [
    (
        "towpath_packets",
        "Packets taken from receive rings and put on transmit rings.",
        "direction",
        &[(Counter::rx_packets, "received"), (Counter::tx_packets, "sent")],
    ),
    (
        "towpath_bytes",
        "Bytes taken from receive rings and put on transmit rings.",
        "direction",
        &[(Counter::rx_bytes, "received"), (Counter::tx_bytes, "sent")],
    ),
    (
        "towpath_verdicts",
        "What became of received packets; those that were dropped are in towpath_drops.",
        "verdict",
        &[
            (Counter::forwarded, "forwarded"),
            (Counter::answered, "answered"),
            (Counter::punted, "punted"),
            (Counter::held, "held"),
        ],
    ),
];

fn packets(shared: &Shared, page: &mut Page<'_>) -> fmt::Result {
    let workers = shared.publisher.workers();
    let value = |index: usize, counter: Counter| workers[index].counters().get(counter);
    for (name, help, label, counters) in SHAPES {
        let samples = (0..workers.len()).flat_map(|index| {
            counters.iter().map(move |(counter, word)| {
                let labels = [worker(index), vec![(label, (*word).to_owned())]].concat();
                (labels, value(index, *counter))
            })
        });
        page.counters(name, help, samples.collect())?;
    }
    let is_shaped =
        |counter: &Counter| SHAPES.iter().any(|shape| shape.3.iter().any(|(own, _)| own == counter));
    for counter in Counter::ALL.iter().filter(|counter| !is_shaped(counter)) {
        let samples = (0..workers.len()).map(|index| (worker(index), value(index, *counter)));
        page.counters(&format!("towpath_{}", counter.name()), counter.help(), samples.collect())?;
    }
    let total = sum(workers.iter().map(|worker| worker.counters()));
    let reasons =
        Reason::ALL.iter().map(|reason| (vec![("reason", reason.name().to_owned())], total.reason(*reason)));
    page.counters("towpath_drops", "Packets dropped or answered instead of forwarded.", reasons.collect())?;
    let steering = shared.steer.counters().into_iter().map(|count| {
        let name = count.name.trim_start_matches("steer_").to_owned();
        (vec![("result", name)], count.value)
    });
    page.counters(
        "towpath_steered",
        "Packets seen by the steering program, by what it did.",
        steering.collect(),
    )
}

fn rings(shared: &Shared, page: &mut Page<'_>) -> fmt::Result {
    let ports = shared.gateway.ports.iter().enumerate();
    let samples = ports.flat_map(|(index, port)| {
        let counters = shared.port_counters(index).into_iter();
        counters.map(|(name, value)| (vec![("port", port.name.clone()), ("counter", name)], value))
    });
    page.counters(
        "towpath_rings",
        "Losses and refusals in the rings of a port, before any packet is received.",
        samples.collect(),
    )
}
