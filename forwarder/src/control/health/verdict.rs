//! Whether the gateway is healthy, and what its probes are answered (kubernetes pkg/proxy/healthcheck).
//!
//! Healthy is a gateway whose workers all live, whose changes come into force, and whose steering program and state are what the
//! tables say. What does no harm to packets (a full disk, a restored object that is left out) is shown by `towpathctl status` only:
//! load balancers would turn away from every gateway at once over it.

use std::collections::BTreeMap;
use std::sync::Arc;

use config::control::ObjectRef;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

use super::http::{JSON, Response, Status};
use super::update::{LATE_AFTER_NS, Updates};
use super::{DEAD_AFTER_NS, heartbeat_age_ns, monotonic_ns};
use crate::addr::Family;
use crate::control::Shared;
use crate::control::compile::health::HealthCheck;

/// Parts of the gateway whose problems harm packets; see [`Shared::problem`].
const MATTER: [&str; 2] = ["state", "steering"];

/// How the gateway is at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// What is wrong, in sentences; empty: it is healthy.
    pub problems: Vec<String>,
    /// By family: changes wait for too long.
    late: [bool; 2],
    /// By family: when a change was last in force everywhere.
    last: [Option<Timestamp>; 2],
}

impl Verdict {
    /// Looks at everything. Waits for nobody.
    pub fn of(shared: &Shared) -> Verdict {
        let now_ns = monotonic_ns();
        let mut verdict = Verdict::default();
        for worker in shared.publisher.workers() {
            let problem = match heartbeat_age_ns(worker, now_ns) {
                None => "has not started".to_owned(),
                Some(age) if age > DEAD_AFTER_NS => {
                    format!("has made no progress for {} ms", age / 1_000_000)
                }
                Some(_) => continue,
            };
            verdict.problems.push(format!("worker {} {problem}", worker.index()));
        }
        let silent_ns = now_ns.saturating_sub(shared.health.commit_beat_ns());
        if silent_ns > LATE_AFTER_NS {
            let seconds = silent_ns / 1_000_000_000;
            verdict.problems.push(format!("the thread that makes changes has been busy for {seconds} s"));
        }
        verdict.judge(&shared.health.updates(), now_ns);
        let harmful = MATTER.into_iter().filter_map(|part| shared.problem_of(part));
        verdict.problems.extend(harmful.map(|fault| fault.message));
        verdict
    }

    /// Looks whether changes come into force.
    fn judge(&mut self, updates: &Updates, now_ns: u64) {
        for family in Family::ALL {
            self.last[family as usize] = updates.last(family);
            if let Some(waited) = updates.late_ns(family, now_ns) {
                self.late[family as usize] = true;
                let seconds = waited / 1_000_000_000;
                self.problems.push(format!("{} changes have waited for {seconds} s", family.name()));
            }
        }
    }

    /// True if nothing is wrong.
    pub fn is_healthy(&self) -> bool {
        self.problems.is_empty()
    }

    /// The answer of `/healthz`: may load balancers send to this node?
    pub fn healthz(&self, node_is_leaving: bool, now: Timestamp) -> Response {
        self.probe(Some(!node_is_leaving), now)
    }

    /// The answer of `/livez`: does it work, whatever becomes of the node?
    pub fn livez(&self, now: Timestamp) -> Response {
        self.probe(None, now)
    }

    fn probe(&self, node_eligible: Option<bool>, now: Timestamp) -> Response {
        let is_good = self.is_healthy() && node_eligible != Some(false);
        let family = |family: Family| {
            let last_updated = self.last[family as usize]?.to_string();
            Some((family.name(), FamilyBody { last_updated, healthy: !self.late[family as usize] }))
        };
        let body = ProbeBody {
            // Of a gateway that is well it is the present, as in kube-proxy, which once made its rules anew all the time.
            last_updated: if is_good { Some(now) } else { self.last.into_iter().flatten().max() }
                .map(|time| time.to_string()),
            current_time: now.to_string(),
            node_eligible,
            healthy: self.is_healthy(),
            status: Family::ALL.into_iter().filter_map(family).collect(),
            problems: &self.problems,
        };
        answer(is_good, &body)
    }

    /// The answer on the `healthCheckNodePort` of a Service, asked by an address of `family`.
    pub fn service(&self, service: &Arc<ObjectRef>, check: &HealthCheck, family: Family) -> Response {
        let local_endpoints = check.local_endpoints[family as usize];
        let body = ServiceBody {
            service: Name { namespace: &service.namespace, name: &service.name },
            local_endpoints,
            service_proxy_healthy: self.is_healthy(),
        };
        answer(local_endpoints > 0 && self.is_healthy(), &body)
            .header("X-Load-Balancing-Endpoint-Weight", local_endpoints)
    }
}

fn answer(is_good: bool, body: &impl Serialize) -> Response {
    let status = if is_good { Status::OK } else { Status::UNAVAILABLE };
    // Bodies have string keys only, so that serializing them cannot fail.
    let body = serde_json::to_string(body).expect("a body is always JSON");
    Response::new(status, JSON, body).header("X-Content-Type-Options", "nosniff")
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ProbeBody<'a> {
    last_updated: Option<String>,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    status: BTreeMap<&'static str, FamilyBody>,
    /// Ours; kube-proxy has none.
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    problems: &'a [String],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyBody {
    last_updated: String,
    healthy: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ServiceBody<'a> {
    service: Name<'a>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

#[derive(Serialize)]
struct Name<'a> {
    namespace: &'a str,
    name: &'a str,
}

#[cfg(test)]
mod tests {
    use config::control::Kind;
    use serde_json::{Value, json};

    use super::super::update::Update;
    use super::*;

    fn body(response: &Response) -> Value {
        serde_json::from_str(&response.body).unwrap()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn verdict(problems: &[&str], late: [bool; 2]) -> Verdict {
        let problems = problems.iter().map(|problem| (*problem).to_owned()).collect();
        Verdict { problems, late, last: [Some(at(60)), Some(at(120))] }
    }

    /// The cases of kubernetes pkg/proxy/healthcheck/healthcheck_test.go `TestHealthzServer` and `TestLivezServer`.
    /// Rules 10.4, 10.5.
    #[test]
    fn healthz_looks_at_the_node_and_livez_does_not() {
        let well = verdict(&[], [false; 2]);
        let ill = verdict(&["IPv6 changes have waited for 25 s"], [false, true]);
        for (verdict, leaving, healthz, livez) in [
            (&well, false, 200, 200),
            (&well, true, 503, 200),
            (&ill, false, 503, 503),
            (&ill, true, 503, 503),
        ] {
            let (healthz_answer, livez_answer) = (verdict.healthz(leaving, at(300)), verdict.livez(at(300)));
            assert_eq!(healthz_answer.status.0, healthz);
            assert_eq!(livez_answer.status.0, livez);
            assert_eq!(body(&healthz_answer)["nodeEligible"], json!(!leaving));
            assert_eq!(body(&livez_answer).get("nodeEligible"), None);
            for answer in [healthz_answer, livez_answer] {
                assert_eq!(answer.content_type, "application/json");
                assert!(answer.headers.contains(&("X-Content-Type-Options", "nosniff".to_owned())));
            }
        }
    }

    /// Rule 10.4.
    #[test]
    fn changes_that_wait_for_too_long_turn_both_red_until_they_are_in_force() {
        let mut updates = Updates::default();
        updates.published(Update::of_everything(1, 0));
        let status = |updates: &Updates, now_ns: u64| {
            let mut verdict = Verdict::default();
            verdict.judge(updates, now_ns);
            [verdict.healthz(false, at(300)), verdict.livez(at(300))].map(|answer| answer.status.0)
        };
        assert_eq!(status(&updates, LATE_AFTER_NS - 1), [200, 200]);
        assert_eq!(status(&updates, LATE_AFTER_NS), [503, 503]);
        updates.in_force(1, at(301));
        assert_eq!(status(&updates, LATE_AFTER_NS), [200, 200]);
    }

    /// Rule 10.3.
    #[test]
    fn bodies_are_those_of_kube_proxy() {
        let (first, second, now) = ("1970-01-01T00:01:00Z", "1970-01-01T00:02:00Z", "1970-01-01T00:05:00Z");
        let status = |v6| json!({"IPv4": {"lastUpdated": first, "healthy": true}, "IPv6": {"lastUpdated": second, "healthy": v6}});
        assert_eq!(
            body(&verdict(&[], [false; 2]).healthz(false, at(300))),
            json!({"lastUpdated": now, "currentTime": now, "nodeEligible": true, "healthy": true, "status": status(true)})
        );
        assert_eq!(
            body(&verdict(&["late"], [false, true]).livez(at(300))),
            json!({"lastUpdated": second, "currentTime": now, "healthy": false, "status": status(false), "problems": ["late"]})
        );
        let young = Verdict::default();
        assert_eq!(
            body(&young.healthz(true, at(300))),
            json!({"lastUpdated": null, "currentTime": now, "nodeEligible": false, "healthy": true, "status": {}})
        );
    }

    /// The cases of kubernetes pkg/proxy/healthcheck/healthcheck_test.go `TestServer`.
    /// Rules 10.1, 10.3.
    #[test]
    fn a_service_is_healthy_with_local_endpoints_on_a_healthy_gateway() {
        let service =
            Arc::new(ObjectRef { kind: Kind::Service, namespace: "shop".into(), name: "web".into() });
        for (endpoints, is_healthy, status) in
            [(0, true, 503), (18, true, 200), (1, true, 200), (0, false, 503), (7, false, 503)]
        {
            let check = HealthCheck { port: 32_000, addresses: vec![], local_endpoints: [endpoints, 0] };
            let problems: &[&str] = if is_healthy { &[] } else { &["worker 0 has not started"] };
            let answer = verdict(problems, [false; 2]).service(&service, &check, Family::V4);
            assert_eq!(answer.status.0, status, "{endpoints} {is_healthy}");
            assert_eq!(
                body(&answer),
                json!({"service": {"namespace": "shop", "name": "web"}, "localEndpoints": endpoints, "serviceProxyHealthy": is_healthy})
            );
            assert_eq!(answer.content_type, "application/json");
            assert_eq!(
                answer.headers,
                [
                    ("X-Content-Type-Options", "nosniff".to_owned()),
                    ("X-Load-Balancing-Endpoint-Weight", endpoints.to_string()),
                ]
            );
            let other = verdict(problems, [false; 2]).service(&service, &check, Family::V6);
            assert_eq!(
                (other.status.0, &body(&other)["localEndpoints"]),
                (503, &json!(0)),
                "each family by itself"
            );
        }
    }
}
