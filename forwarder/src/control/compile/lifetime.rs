//! What becomes of the connections of an endpoint that goes: left to themselves, as kube-proxy leaves them, or reset.
//!
//! Annotations of a Service, over `[gateway] on_endpoint_removed`:
//!
//! | `towpath.dev/on-endpoint-removed` | `towpath.dev/drain-seconds` | connections of an endpoint are reset |
//! | --- | --- | --- |
//! | `leave` | ignored | never |
//! | `reset` | absent | when it is in no slice of the Service any more |
//! | `reset`, or absent | N | N seconds after it began to terminate or left its slices, whichever came first |
//!
//! Without a deadline an endpoint that terminates keeps its connections, whatever its readiness says: many servers fail their probe
//! while they finish what they have begun. One that is not ready but does not terminate always keeps them, and so does one of weight 0.

use std::sync::Arc;

use config::gateway::{Gateway, OnEndpointRemoved};

use super::endpoints::EndpointInfo;
use super::service::Destinations;
use crate::control::facts::ServiceFacts;

/// When connections of an endpoint that goes are reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Removal {
    /// Never.
    #[default]
    Leave,
    /// When it is in no slice of the Service any more.
    WhenGone,
    /// So many seconds after it began to terminate or left, whichever came first.
    After(u32),
}

impl Removal {
    /// What a Service asks for.
    pub(super) fn of(facts: &ServiceFacts, gateway: &Gateway) -> Removal {
        let default = match facts.drain_s {
            Some(_) => OnEndpointRemoved::Reset,
            None => gateway.gateway.on_endpoint_removed,
        };
        match (facts.on_endpoint_removed.unwrap_or(default), facts.drain_s) {
            (OnEndpointRemoved::Leave, _) => Removal::Leave,
            (OnEndpointRemoved::Reset, None) => Removal::WhenGone,
            (OnEndpointRemoved::Reset, Some(seconds)) => Removal::After(seconds),
        }
    }

    /// Seconds from the moment at which an endpoint [goes](Lifetime::staying) to the reset; `None`: there is none.
    pub fn after_s(self) -> Option<u32> {
        match self {
            Removal::Leave => None,
            Removal::WhenGone => Some(0),
            Removal::After(seconds) => Some(seconds),
        }
    }

    /// In words.
    pub(super) fn describe(self) -> String {
        match self {
            Removal::Leave => "leave".to_owned(),
            Removal::WhenGone => "reset when it is gone".to_owned(),
            Removal::After(seconds) => format!("reset {seconds} s after it began to terminate or left"),
        }
    }
}

/// Which endpoints of a port of a Service keep their connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lifetime {
    /// What becomes of the connections of the others.
    pub removal: Removal,
    /// Those that are there to stay. The others go, or are gone.
    pub staying: Arc<Destinations>,
}

impl Lifetime {
    /// `endpoints`: of both families.
    pub(super) fn new<'e>(removal: Removal, endpoints: impl Iterator<Item = &'e EndpointInfo>) -> Lifetime {
        let stays = |info: &&EndpointInfo| removal == Removal::WhenGone || !info.terminating;
        let staying = endpoints.filter(stays).map(|info| (info.endpoint.addr, info.endpoint.port));
        Lifetime { removal, staying: Arc::new(staying.collect()) }
    }
}
