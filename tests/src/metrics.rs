//! A strict reader of metrics in the OpenMetrics text format (1.0.0, as far as Towpath uses it): what it takes, Prometheus takes.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};

/// Samples by name and labels, as they are written: `towpath_drops_total{reason="no_route"}`.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    samples: BTreeMap<String, f64>,
    types: BTreeMap<String, String>,
    /// Bound and value of each bucket, by the sample that has their count.
    buckets: BTreeMap<String, Vec<(f64, f64)>>,
}

/// One line with a value.
struct Sample<'t> {
    name: &'t str,
    labels: Vec<(&'t str, String)>,
    value: f64,
}

impl Metrics {
    /// Reads all of it.
    ///
    /// # Errors
    /// The first line that is not as it should be.
    pub fn parse(text: &str) -> Result<Metrics> {
        let body = text.strip_suffix("# EOF\n").context("it does not end with # EOF")?;
        ensure!(body.is_empty() || body.ends_with('\n'), "the last line has no end");
        let mut metrics = Metrics::default();
        let mut helped = BTreeSet::new();
        // Name and type of the family whose lines these are.
        let mut family: Option<(String, String)> = None;
        for line in body.lines() {
            metrics.line(line, &mut helped, &mut family).with_context(|| format!("line {line:?}"))?;
        }
        metrics.check_histograms()?;
        Ok(metrics)
    }

    fn line(
        &mut self,
        line: &str,
        helped: &mut BTreeSet<String>,
        family: &mut Option<(String, String)>,
    ) -> Result<()> {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, words) = help.split_once(' ').context("no help")?;
            ensure!(is_name(name) && !words.is_empty(), "neither name nor help");
            ensure!(helped.insert(name.to_owned()), "a second help");
            *family = None;
            return Ok(());
        }
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').context("no type")?;
            ensure!(["counter", "gauge", "histogram"].contains(&kind), "type {kind}");
            ensure!(helped.contains(name), "no help before it");
            ensure!(self.types.insert(name.to_owned(), kind.to_owned()).is_none(), "a second type");
            *family = Some((name.to_owned(), kind.to_owned()));
            return Ok(());
        }
        let sample = sample(line)?;
        let (name, kind) = family.as_ref().context("a sample without a type before it")?;
        let ending = sample.name.strip_prefix(name.as_str()).context("a sample of another family")?;
        let endings: &[&str] = match kind.as_str() {
            "counter" => &["_total"],
            "histogram" => &["_bucket", "_sum", "_count"],
            _ => &[""],
        };
        ensure!(endings.contains(&ending), "ending {ending:?} of a {kind}");
        ensure!(kind == "gauge" || sample.value >= 0.0, "less than nothing");
        if ending == "_bucket" {
            let is_bound = |label: &(&str, String)| label.0 == "le";
            let (_, bound) = sample.labels.iter().find(|label| is_bound(label)).context("no bound")?;
            let others: Vec<_> = sample.labels.iter().filter(|label| !is_bound(label)).cloned().collect();
            let count = key(&format!("{name}_count"), &others);
            self.buckets.entry(count).or_default().push((bound.parse()?, sample.value));
        }
        let key = key(sample.name, &sample.labels);
        ensure!(self.samples.insert(key, sample.value).is_none(), "a second value");
        Ok(())
    }

    /// Buckets come in the order of their bounds and count up to the count.
    fn check_histograms(&self) -> Result<()> {
        for (count, buckets) in &self.buckets {
            let rises = |pair: &[(f64, f64)]| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1;
            ensure!(buckets.windows(2).all(rises), "{count}: not cumulative: {buckets:?}");
            let total = self.get(count)?;
            let last = *buckets.last().context("no bucket")?;
            ensure!(last == (f64::INFINITY, total), "{count} is {total}, the last bucket {last:?}");
        }
        Ok(())
    }

    /// The value of a sample, as `towpath_drops_total{reason="no_route"}`.
    ///
    /// # Errors
    /// There is none.
    pub fn get(&self, sample: &str) -> Result<f64> {
        self.samples.get(sample).copied().with_context(|| format!("{sample} is missing"))
    }

    /// The sum of all samples of a name, whatever their labels.
    pub fn sum(&self, name: &str) -> f64 {
        let named = |key: &str| key.split('{').next() == Some(name);
        self.samples.iter().filter(|(key, _)| named(key)).map(|(_, value)| value).sum()
    }

    /// Names and types of the families.
    pub fn types(&self) -> &BTreeMap<String, String> {
        &self.types
    }
}

/// A sample as it is written.
fn key(name: &str, labels: &[(&str, String)]) -> String {
    let labels: Vec<_> = labels.iter().map(|(name, value)| format!("{name}={value:?}")).collect();
    if labels.is_empty() { name.to_owned() } else { format!("{name}{{{}}}", labels.join(",")) }
}

fn is_name(text: &str) -> bool {
    let is_letter = |c: char| c.is_ascii_alphabetic() || c == '_';
    text.starts_with(is_letter) && text.chars().all(|c| is_letter(c) || c.is_ascii_digit())
}

fn sample(line: &str) -> Result<Sample<'_>> {
    let at = line.find(['{', ' ']).context("no value")?;
    let (name, mut rest) = line.split_at(at);
    ensure!(is_name(name), "name {name:?}");
    let mut labels = Vec::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        while !rest.starts_with('}') {
            let (label, after) = rest.split_once("=\"").context("a label without a value")?;
            ensure!(is_name(label) && !labels.iter().any(|(other, _)| *other == label), "label {label:?}");
            let (value, after) = quoted(after)?;
            labels.push((label, value));
            rest = match after.strip_prefix(',') {
                Some(more) if !more.starts_with('}') => more,
                None if after.starts_with('}') => after,
                _ => bail!("what follows label {label:?}"),
            };
        }
        rest = &rest[1..];
    }
    let number = rest.strip_prefix(' ').context("no blank before the value")?;
    ensure!(!number.contains(' '), "more than a value");
    let value: f64 = number.parse().with_context(|| format!("value {number:?}"))?;
    ensure!(value.is_finite(), "value {number}");
    Ok(Sample { name, labels, value })
}

/// The text up to the next quotation mark that is not escaped, and what follows it.
fn quoted(text: &str) -> Result<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match chars.next().map(|(_, escaped)| escaped) {
                Some('n') => value.push('\n'),
                Some(c @ ('"' | '\\')) => value.push(c),
                other => bail!("escape {other:?}"),
            },
            c => value.push(c),
        }
    }
    bail!("a label value without an end")
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"# HELP a Things.
# TYPE a counter
a_total{x="1",y="a\"b\\c"} 7
a_total{x="2",y=""} 3
# HELP b More.
# TYPE b gauge
b -1.5
# HELP c Seconds.
# TYPE c histogram
c_sum 3.5
c_count 2
c_bucket{le="1.0"} 1
c_bucket{le="10.0"} 2
c_bucket{le="+Inf"} 2
# EOF
"#;

    #[test]
    fn good_metrics_are_read() {
        let metrics = Metrics::parse(GOOD).unwrap_or_else(|error| panic!("{error:#}"));
        assert_eq!((metrics.sum("a_total"), metrics.get("b").unwrap()), (10.0, -1.5));
        assert_eq!(metrics.get(r#"a_total{x="1",y="a\"b\\c"}"#).unwrap(), 7.0);
        assert_eq!(metrics.types()["c"], "histogram");
        assert!(metrics.get("d").is_err());
    }

    #[test]
    fn bad_metrics_are_refused() {
        for (from, to) in [
            ("# EOF\n", ""),
            ("# TYPE a counter\n", ""),
            ("# HELP a Things.\n", ""),
            ("# TYPE b gauge", "# TYPE a gauge"),
            ("a_total{x=\"2\"", "a{x=\"2\""),
            ("{x=\"2\",y=\"\"} 3", "{x=\"1\",y=\"a\\\"b\\\\c\"} 3"),
            ("{x=\"2\",y=\"\"}", "{x=\"2\",x=\"3\"}"),
            ("{x=\"2\",y=\"\"}", "{x=\"2\" y=\"\"}"),
            ("{x=\"2\",y=\"\"}", "{x=\"2}"),
            ("{x=\"2\",y=\"\"}", "{x=\"\\t\"}"),
            ("b -1.5", "b NaN"),
            ("b -1.5", "b 1 2 3"),
            ("b -1.5", "b"),
            ("b -1.5", "b-c 1"),
            ("\"\"} 3", "\"\"} -3"),
            ("le=\"1.0\"} 1", "le=\"1.0\"} 3"),
            ("le=\"+Inf\"} 2", "le=\"+Inf\"} 3"),
            ("c_bucket{le=\"+Inf\"} 2\n", ""),
        ] {
            assert!(GOOD.contains(from), "{from:?}");
            assert!(Metrics::parse(&GOOD.replacen(from, to, 1)).is_err(), "{from:?} -> {to:?}");
        }
    }
}
