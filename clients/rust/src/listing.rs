//! What the host has: flights by name, kernels, plugins, workers, quotas. Lists come page by page.

use crate::error::Error;
use crate::session::Session;
use crate::wire::{self, Flight, Kernel, Mapping, Op};

impl Session {
    pub(crate) async fn lookup(&self, name: &str) -> Result<Mapping, Error> {
        let body = wire::Name {
            name: name.to_owned(),
            request_id: self.request_id(),
        };
        let mapped: wire::Mapped = self.ask(Op::Lookup, &body).await?;
        Ok(mapped.mapping)
    }

    pub(crate) async fn drop_flight(&self, name: &str) -> Result<(), Error> {
        let body = wire::Name {
            name: name.to_owned(),
            request_id: self.request_id(),
        };
        self.ask::<_, wire::Done>(Op::Drop, &body).await.map(drop)
    }

    pub(crate) async fn share(
        &self,
        name: &str,
        (add, remove): (&[&str], &[&str]),
    ) -> Result<Vec<String>, Error> {
        let own = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
        let body = wire::Share {
            name: name.to_owned(),
            add: own(add),
            remove: own(remove),
            request_id: self.request_id(),
        };
        let shared: wire::Shared = self.ask(Op::Share, &body).await?;
        Ok(shared.shared)
    }

    pub(crate) async fn list(&self) -> Result<Vec<Flight>, Error> {
        let mut flights = Vec::new();
        let mut pages = FlightPages::new(self);
        while let Some(page) = pages.next().await? {
            flights.extend(page);
        }
        Ok(flights)
    }

    pub(crate) async fn kernels(&self, name: Option<&str>) -> Result<Vec<Kernel>, Error> {
        let mut kernels: Vec<Kernel> = Vec::new();
        loop {
            let after = kernels
                .last()
                .map(|kernel| format!("{}/{}", kernel.plugin, kernel.name));
            let kernel = name.map(str::to_owned);
            let body = wire::Kernels {
                after,
                kernel,
                request_id: self.request_id(),
            };
            let page: wire::KernelList = self.ask(Op::Kernels, &body).await?;
            check_page(page.more, page.kernels.is_empty())?;
            kernels.extend(page.kernels);
            if !page.more {
                return Ok(kernels);
            }
        }
    }

    pub(crate) async fn workers(&self) -> Result<Vec<wire::Worker>, Error> {
        let mut workers: Vec<wire::Worker> = Vec::new();
        loop {
            let body = wire::AskWorkers {
                after: workers.last().map(|last| last.number),
                request_id: self.request_id(),
            };
            let page: wire::WorkerList = self.ask(Op::Workers, &body).await?;
            check_page(page.more, page.workers.is_empty())?;
            workers.extend(page.workers);
            if !page.more {
                return Ok(workers);
            }
        }
    }

    /// After `enable`, if there is one: a plugin, and for whom.
    pub(crate) async fn plugins(
        &self,
        enable: Option<(&str, Option<&str>)>,
    ) -> Result<Vec<wire::Plugin>, Error> {
        let mut plugins: Vec<wire::Plugin> = Vec::new();
        let (mut enable, principal) = match enable {
            Some((plugin, principal)) => (Some(plugin.to_owned()), principal),
            None => (None, None),
        };
        loop {
            let body = wire::AskPlugins {
                after: plugins.last().map(|last| last.name.clone()),
                principal: enable.as_ref().and(principal).map(str::to_owned),
                enable: enable.take(),
                request_id: self.request_id(),
            };
            let page: wire::PluginList = self.ask(Op::Plugins, &body).await?;
            check_page(page.more, page.plugins.is_empty())?;
            plugins.extend(page.plugins);
            if !page.more {
                return Ok(plugins);
            }
        }
    }

    pub(crate) async fn limits(
        &self,
        principal: Option<&str>,
        mut set: Option<wire::QuotaSettings>,
    ) -> Result<wire::QuotaList, Error> {
        let mut accounts: Vec<wire::AccountQuotas> = Vec::new();
        loop {
            let body = wire::AskLimits {
                after: accounts.last().map(|last| last.principal.clone()),
                principal: principal.map(str::to_owned),
                // With the first page only.
                set: set.take(),
                request_id: self.request_id(),
            };
            let page: wire::QuotaList = self.ask(Op::Limits, &body).await?;
            check_page(page.more, page.accounts.is_empty())?;
            accounts.extend(page.accounts);
            if !page.more {
                return Ok(wire::QuotaList { accounts, ..page });
            }
        }
    }
}

/// How far the list of flights has been read.
#[derive(Debug)]
pub(crate) struct FlightPages<'a> {
    pub(crate) session: &'a Session,
    after: Option<String>,
    more: bool,
}

impl<'a> FlightPages<'a> {
    pub(crate) fn new(session: &'a Session) -> Self {
        Self {
            session,
            after: None,
            more: true,
        }
    }

    /// As many of the following flights as fit into a frame; `None` at the end, which an error is
    /// too.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<Flight>>, Error> {
        if !std::mem::take(&mut self.more) {
            return Ok(None);
        }
        let body = wire::List {
            after: self.after.take(),
            request_id: self.session.request_id(),
        };
        let page: wire::Flights = self.session.ask(Op::List, &body).await?;
        check_page(page.more, page.flights.is_empty())?;
        self.more = page.more;
        self.after = page.flights.last().map(|flight| flight.name.clone());
        Ok(Some(page.flights))
    }
}

/// A page that promises more but is empty would be asked for without end.
fn check_page(more: bool, empty: bool) -> Result<(), Error> {
    if more && empty {
        return Err(Error::Protocol(
            "an empty page of a list promises more".into(),
        ));
    }
    Ok(())
}
