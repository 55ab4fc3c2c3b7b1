//! `towpathctl describe service`.

use anyhow::{Result, bail};
use config::control::{Noun, Reply, Request};

use crate::connection::unexpected;
use crate::get::Resource;
use crate::print::{self, Output, out, out_value};
use crate::{Ending, Global, service};

/// Arguments of `describe`.
#[derive(clap::Args)]
pub struct Args {
    /// service, or service/NAME
    #[arg(value_name = "KIND[/NAME]")]
    what: String,
    /// NAME or NAMESPACE/NAME
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// The namespace
    #[arg(short, long, default_value = "default", value_name = "NAMESPACE")]
    namespace: String,
    /// How to print
    #[arg(short, long, value_name = "FORM", value_parser = print::forms(), default_value = "table", hide_default_value = true)]
    output: Output,
}

impl Args {
    /// Namespace and name of each Service that is asked for.
    fn services(&self) -> Result<Vec<(String, String)>> {
        let (kind, first) = match self.what.split_once('/') {
            Some((kind, name)) => (kind, Some(name.to_owned())),
            None => (self.what.as_str(), None),
        };
        let resource = Resource::parse(kind)?;
        if resource != Resource::Noun(Noun::Services) {
            bail!(
                "only Services can be described; for the rest see `towpathctl get {} -o yaml`",
                resource.name()
            );
        }
        let names: Vec<String> = first.into_iter().chain(self.names.iter().cloned()).collect();
        if names.is_empty() {
            bail!(
                "which Service? say `towpathctl describe service NAME -n NAMESPACE` or `describe service NAMESPACE/NAME`"
            );
        }
        Ok(names
            .into_iter()
            .map(|name| match name.split_once('/') {
                Some((namespace, name)) => (namespace.to_owned(), name.to_owned()),
                None => (self.namespace.clone(), name),
            })
            .collect())
    }
}

/// Runs `describe`.
pub fn run(global: &Global, args: &Args) -> Result<Ending> {
    let services = args.services()?;
    let connection = &mut global.connect()?;
    for (i, (namespace, name)) in services.into_iter().enumerate() {
        let description = match connection.ask(&Request::DescribeService { namespace, name })? {
            Reply::Service(description) => description,
            other => return Err(unexpected(&other)),
        };
        if matches!(args.output, Output::Json | Output::Yaml) {
            out_value(args.output, &description)?;
        } else {
            let gap = if i == 0 { "" } else { "\n\n" };
            out(&format!("{gap}{}", service::describe(&description, global.paint())))?;
        }
    }
    Ok(Ending::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn services(what: &str, names: &[&str]) -> Result<Vec<(String, String)>> {
        let names = names.iter().map(|n| n.to_string()).collect();
        Args { what: what.into(), names, namespace: "shop".into(), output: Output::Table }.services()
    }

    #[test]
    fn every_form_of_a_name() {
        let one = |namespace: &str, name: &str| vec![(namespace.to_owned(), name.to_owned())];
        assert_eq!(services("service", &["web"]).unwrap(), one("shop", "web"));
        assert_eq!(services("svc", &["default/web"]).unwrap(), one("default", "web"));
        assert_eq!(services("service/web", &[]).unwrap(), one("shop", "web"));
        assert!(services("service", &[]).unwrap_err().to_string().contains("which Service"));
        assert!(services("pods", &["a"]).unwrap_err().to_string().contains("get pods -o yaml"));
    }
}
