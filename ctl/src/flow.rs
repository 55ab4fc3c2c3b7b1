//! Flows: `flows list`, `flows count`, `flows flush`, and `get flows`.

use anyhow::{Result, bail};
use clap::Subcommand;
use config::control::{FlowFilter, FlowRow, Item, Reply, Request};
use serde_json::json;

use crate::connection::{Connection, unexpected, unexpected_item};
use crate::get::{Row, View, add_row, table_of};
use crate::print::{self, Cell, Output, Paint, Tint, age, notice, now_s, out, out_value, thousands};
use crate::{Ending, Global, Usage};

/// Arguments of `flows`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List flows
    List {
        #[command(flatten)]
        list: ListArgs,
        /// How to print
        #[arg(short, long, value_name = "FORM", value_parser = print::forms_with_name(), default_value = "table", hide_default_value = true)]
        output: Output,
    },
    /// Count flows
    Count {
        #[command(flatten)]
        filter: FilterArgs,
        /// How to print
        #[arg(short, long, value_name = "FORM", value_parser = print::forms(), default_value = "table", hide_default_value = true)]
        output: Output,
    },
    /// Remove flows: their next packet is judged anew
    Flush {
        #[command(flatten)]
        filter: FilterArgs,
        /// Remove every flow
        #[arg(long)]
        all: bool,
        /// How to print
        #[arg(short, long, value_name = "FORM", value_parser = print::forms(), default_value = "table", hide_default_value = true)]
        output: Output,
    },
}

/// What to list.
#[derive(clap::Args, Default)]
pub struct ListArgs {
    #[command(flatten)]
    filter: FilterArgs,
    /// At most so many
    #[arg(long, value_name = "COUNT")]
    limit: Option<u64>,
}

/// Which flows: all that is given must hold.
#[derive(clap::Args, Default)]
pub struct FilterArgs {
    /// tcp, udp, icmp, icmpv6 or sctp
    #[arg(long, value_name = "PROTOCOL", ignore_case = true, value_parser = ["tcp", "udp", "icmp", "icmpv6", "sctp"])]
    protocol: Option<String>,
    /// Address or prefix of the client
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    client: Option<String>,
    /// Address, prefix or address:port that the client spoke to
    #[arg(long, visible_alias = "vip", value_name = "ADDRESS[:PORT]", value_parser = address_or_socket)]
    frontend: Option<String>,
    /// Address, prefix or address:port of the endpoint
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = address_or_socket)]
    endpoint: Option<String>,
    /// The Service
    #[arg(long, value_name = "[NAMESPACE/]NAME")]
    service: Option<String>,
    /// State of the connection, such as established
    #[arg(long, value_name = "STATE")]
    state: Option<String>,
}

fn address(text: &str) -> Result<String, String> {
    if text.parse::<std::net::IpAddr>().is_ok() || text.parse::<ipnet::IpNet>().is_ok() {
        Ok(text.to_owned())
    } else {
        Err("not an address or a prefix, such as 198.51.100.7 or 2001:db8::/64".to_owned())
    }
}

fn address_or_socket(text: &str) -> Result<String, String> {
    if text.parse::<std::net::SocketAddr>().is_ok() {
        return Ok(text.to_owned());
    }
    address(text).map_err(|_| {
        "not an address, a prefix or address:port, such as 203.0.113.10:80 or [2001:db8::1]:80".to_owned()
    })
}

impl FilterArgs {
    fn filter(&self) -> FlowFilter {
        FlowFilter {
            protocol: self.protocol.as_ref().map(|p| p.to_ascii_lowercase()),
            client: self.client.clone(),
            frontend: self.frontend.clone(),
            endpoint: self.endpoint.clone(),
            service: self
                .service
                .as_ref()
                .map(|s| if s.contains('/') { s.clone() } else { format!("default/{s}") }),
            state: self.state.clone(),
        }
    }
}

impl Row for FlowRow {
    const SINGULAR: &'static str = "flow";

    fn from_item(item: Item) -> Option<Self> {
        match item {
            Item::Flow(row) => Some(row),
            _ => None,
        }
    }

    fn name(&self) -> String {
        format!("{}:{}>{}", self.protocol, self.client, self.frontend)
    }

    fn header(view: View) -> Vec<&'static str> {
        let mut header =
            vec!["PROTO", "STATE", "CLIENT", "FRONTEND", "ENDPOINT", "SERVICE", "IDLE", "EXPIRES"];
        if view.wide {
            header.extend(["AGE", "MASQUERADED-AS", "GENERATION"]);
        }
        header
    }

    fn cells(&self, view: View) -> Vec<Cell> {
        let tint = if self.state == "established" { Tint::Good } else { Tint::Plain };
        let mut cells = vec![
            self.protocol.as_str().into(),
            Cell::new(tint, self.state.as_str()),
            self.client.as_str().into(),
            self.frontend.as_str().into(),
            self.endpoint.as_str().into(),
            self.service.clone().unwrap_or_default().into(),
            age(self.idle_s.into()).into(),
            age(self.timeout_s.saturating_sub(self.idle_s).into()).into(),
        ];
        if view.wide {
            cells.extend([
                age(self.age_s.into()).into(),
                self.masqueraded_as.clone().unwrap_or_default().into(),
                self.generation.to_string().into(),
            ]);
        }
        cells
    }
}

/// Runs `flows`.
pub fn run(global: &Global, args: &Args) -> Result<Ending> {
    match &args.command {
        Command::List { list: what, output } => list(&mut global.connect()?, what, *output, global.paint())?,
        Command::Count { filter, output } => {
            let request = Request::CountFlows { filter: filter.filter() };
            count(global, &request, *output, "")?;
        }
        Command::Flush { filter, all, output } => {
            let filter = filter.filter();
            if filter == FlowFilter::default() && !all {
                bail!(Usage("this would remove every flow: say which ones, or --all".into()));
            }
            count(global, &Request::FlushFlows { filter }, *output, " removed")?;
        }
    }
    Ok(Ending::Done)
}

fn count(global: &Global, request: &Request, output: Output, done: &str) -> Result<()> {
    match global.connect()?.ask(request)? {
        Reply::FlowCount { count } if matches!(output, Output::Json | Output::Yaml) => {
            out_value(output, &json!({ "count": count }))
        }
        // A number alone, for scripts; a sentence for what was changed.
        Reply::FlowCount { count } if done.is_empty() => out(&format!("{count}\n")),
        Reply::FlowCount { count } => {
            out(&format!("{} flow{}{done}\n", thousands(count), if count == 1 { "" } else { "s" }))
        }
        other => Err(unexpected(&other)),
    }
}

/// Rows that are laid out together: a table of a million flows need not be held to be printed.
const ROWS_AT_ONCE: usize = 1000;

/// Lists flows as they come.
pub fn list(connection: &mut Connection, args: &ListArgs, output: Output, paint: Paint) -> Result<()> {
    let request = Request::Flows { filter: args.filter.filter(), limit: args.limit };
    let mut total = 0;
    match output {
        Output::Hosts => bail!("-o hosts is a form of `get dns` only"),
        Output::Json | Output::Yaml => {
            let mut items: Vec<FlowRow> = Vec::new();
            connection.list(&request, |item| {
                items.push(Row::from_item(item).ok_or_else(unexpected_item)?);
                Ok(())
            })?;
            return out_value(output, &json!({"apiVersion": "v1", "kind": "List", "items": items}));
        }
        Output::Table | Output::Wide | Output::Name => {
            let view = View { wide: output == Output::Wide, namespaces: false, now_s: now_s() };
            let mut table = table_of::<FlowRow>(view);
            connection.list(&request, |item| {
                let row = FlowRow::from_item(item).ok_or_else(unexpected_item)?;
                total += 1;
                if output == Output::Name {
                    return out(&format!("{}/{}\n", FlowRow::SINGULAR, row.name()));
                }
                add_row(&mut table, &row, view);
                if table.len() < ROWS_AT_ONCE { Ok(()) } else { out(&table.take(paint, 0)) }
            })?;
            if table.len() > 0 {
                out(&table.take(paint, 0))?;
            }
        }
    }
    if total == 0 {
        notice("No flows found.");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::get::print_rows;

    #[test]
    fn flows_show_both_translations() {
        let rows = [FlowRow {
            protocol: "tcp".into(),
            client: "198.51.100.7:4242".into(),
            frontend: "203.0.113.10:8080".into(),
            endpoint: "10.244.1.7:80".into(),
            masqueraded_as: Some("192.168.50.2:4242".into()),
            state: "established".into(),
            service: Some("default/my-nginx:http".into()),
            age_s: 65,
            idle_s: 3,
            timeout_s: 7440,
            generation: 7,
        }];
        insta::assert_snapshot!(print_rows(&rows, View::NARROW), @"
        PROTO   STATE         CLIENT              FRONTEND            ENDPOINT        SERVICE                 IDLE   EXPIRES
        tcp     established   198.51.100.7:4242   203.0.113.10:8080   10.244.1.7:80   default/my-nginx:http   3s     123m
        ");
        insta::assert_snapshot!(print_rows(&rows, View { namespaces: false, ..View::WIDE }), @"
        PROTO   STATE         CLIENT              FRONTEND            ENDPOINT        SERVICE                 IDLE   EXPIRES   AGE   MASQUERADED-AS      GENERATION
        tcp     established   198.51.100.7:4242   203.0.113.10:8080   10.244.1.7:80   default/my-nginx:http   3s     123m      65s   192.168.50.2:4242   7
        ");
    }

    #[test]
    fn filters_are_checked_before_they_are_sent() {
        assert!(address("10.0.0.0/8").is_ok() && address("2001:db8::1").is_ok());
        assert!(address("10.0.0.1:80").is_err() && address("web").is_err());
        assert!(address_or_socket("[2001:db8::1]:80").is_ok() && address_or_socket("10.0.0.1:80").is_ok());
        assert!(address_or_socket("10.0.0.1:99999").is_err());
        let args =
            FilterArgs { service: Some("web".into()), protocol: Some("TCP".into()), ..Default::default() };
        assert_eq!(args.filter().service.as_deref(), Some("default/web"));
        assert_eq!(args.filter().protocol.as_deref(), Some("tcp"));
    }
}
