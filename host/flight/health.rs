//! gRPC's health service: whether the host takes calls. Nobody is asked who asks.

use arrow_flight::flight_service_server::FlightServiceServer;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};

use super::service::Service;

/// How the paths of its calls begin.
pub(super) const PATH: &str = "/grpc.health.v1.Health/";

/// What it answers.
#[derive(Clone, Debug)]
pub(super) struct Health(HealthReporter);

impl Health {
    /// Of a host that takes calls.
    pub(super) async fn new() -> Self {
        let reporter = HealthReporter::new();
        reporter.set_serving::<FlightServiceServer<Service>>().await;
        Self(reporter)
    }

    /// The host ends.
    pub(super) async fn drain(&self) {
        self.0
            .set_not_serving::<FlightServiceServer<Service>>()
            .await;
        self.0
            .set_service_status("", ServingStatus::NotServing)
            .await;
    }

    pub(super) fn service(&self) -> HealthServer<HealthService> {
        HealthServer::new(HealthService::from_health_reporter(self.0.clone()))
    }
}
