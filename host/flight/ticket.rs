//! Tickets: what DoGet gives, and which rows of it.

use std::ops::Range;

use arrow_flight::Ticket;
use serde::{Deserialize, Serialize};

use super::refused::{bad_request, host_bug};
use crate::error::{Code, Reason, Status};
use crate::lease::{LiveSegment, SegmentId};
use crate::session::Host;

/// Most endpoints of one flight.
pub(super) const ENDPOINTS_MAX: u64 = 8;

/// What a ticket stands for, as it is written.
///
/// A flight has a `name`; a result that nobody published has the id of its `segment`. Of some `rows` of a flight the
/// ticket has both: another flight may have taken the name since, and rows of the two are no table.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    segment: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    channel: Option<String>,
    /// The first row, and the first that is not wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rows: Option<(u64, u64)>,
}

/// Where to look for it.
#[derive(Debug, PartialEq)]
pub(super) enum Source<'a> {
    /// Among the flights.
    Name(&'a str),
    /// Among the results that nobody published.
    Segment(SegmentId),
    /// Among the channels, whose batches come while its stream goes on.
    Channel(&'a str),
}

impl Wanted {
    /// All of a flight.
    pub(super) fn name(name: &str) -> Self {
        Self {
            name: Some(name.to_owned()),
            ..Self::default()
        }
    }

    /// What comes of a stream.
    pub(super) fn channel(name: &str) -> Self {
        Self {
            channel: Some(name.to_owned()),
            ..Self::default()
        }
    }

    /// All of a result that nobody published.
    pub(super) fn segment(segment: &LiveSegment) -> Self {
        Self {
            segment: Some(segment.id().to_string()),
            ..Self::default()
        }
    }

    /// Those `rows` of it, which is `segment` now; or all.
    pub(super) fn part(&self, segment: &LiveSegment, rows: Option<Range<u64>>) -> Self {
        match rows {
            Some(rows) => Self {
                name: self.name.clone(),
                channel: None,
                segment: Some(segment.id().to_string()),
                rows: Some((rows.start, rows.end)),
            },
            None => self.clone(),
        }
    }

    /// Reads a ticket: our JSON, or simply a flight's name.
    pub(super) fn of(ticket: &Ticket) -> Result<Self, Status> {
        let text = std::str::from_utf8(&ticket.ticket).map_err(|error| {
            bad_request(format!(
                "the ticket is not text ({error}); give a flight's name, or a ticket from a FlightInfo"
            ))
        })?;
        if !text.starts_with('{') {
            return Ok(Self::name(text));
        }
        let wrong = |what: &str| {
            bad_request(format!(
                "the ticket {text:.200} is none of {{\"name\": …}}, {{\"segment\": …}}, each with \"rows\" or without, \
                 and {{\"channel\": …}} ({what}); take it from a FlightInfo"
            ))
        };
        let wanted: Self = serde_json::from_str(text).map_err(|error| wrong(&error.to_string()))?;
        if let Some(channel) = &wanted.channel {
            return match wanted == Self::channel(channel) {
                true => Ok(wanted),
                false => Err(wrong("a channel has no rows, name or segment")),
            };
        }
        match (&wanted.name, &wanted.segment, wanted.rows) {
            (None, None, _) => Err(wrong("it names nothing")),
            (Some(_), Some(_), None) => Err(wrong("a name and a segment belong to rows")),
            (Some(_), None, Some(_)) => Err(wrong("rows of a name need its segment")),
            (_, _, Some((start, end))) if start > end => {
                Err(wrong(&format!("its rows end at {end}, before {start}")))
            }
            _ => Ok(wanted),
        }
    }

    /// As [`Self::of`] reads it.
    pub(super) fn ticket(&self) -> Result<Ticket, Status> {
        let json = serde_json::to_vec(self).map_err(|error| host_bug("writing a ticket", error))?;
        Ok(Ticket::new(json))
    }

    /// Where it is.
    ///
    /// # Errors
    /// `BAD_REQUEST` for a segment's id that is none.
    pub(super) fn source(&self) -> Result<Source<'_>, Status> {
        if let Some(channel) = &self.channel {
            return Ok(Source::Channel(channel));
        }
        match (&self.name, &self.segment) {
            (Some(name), _) => Ok(Source::Name(name)),
            (None, Some(id)) => Ok(Source::Segment(
                id.parse().map_err(|error: String| bad_request(error))?,
            )),
            (None, None) => Err(bad_request("a ticket that names nothing")),
        }
    }

    /// The rows that are wanted of `segment`, which was found where it is. None: all.
    ///
    /// # Errors
    /// `SEGMENT_NOT_FOUND` if the name is another flight's by now; `BAD_REQUEST` for rows that it does not have.
    pub(super) fn rows_of(&self, segment: &LiveSegment) -> Result<Option<Range<u64>>, Status> {
        let Some((start, end)) = self.rows else {
            return Ok(None);
        };
        let now = segment.id().to_string();
        let meant = self.segment.as_deref().unwrap_or_default();
        if meant != now {
            let name = self.name.as_deref().unwrap_or_default();
            return Err(Status::new(
                Code::NotFound,
                Reason::SegmentNotFound,
                format!(
                    "flight `{name:.200}` is not segment {meant:.50} (any more), of which rows {start} to {end} were asked; \
                     ask GetFlightInfo again and read all of its endpoints"
                ),
            ));
        }
        let count = rows(segment).unwrap_or(0);
        if end > count {
            return Err(bad_request(format!(
                "the ticket's rows {start} to {end} are not within the {count} rows of segment {now}; \
                 take it from a FlightInfo"
            )));
        }
        Ok(Some(start..end))
    }
}

/// The rows of a segment, if it is one table.
fn rows(segment: &LiveSegment) -> Option<u64> {
    let mut counts = segment.tensors().iter().map(|tensor| tensor.spec.rows());
    let first = counts.next()?;
    counts.all(|count| count == first).then_some(first)
}

/// How a segment is cut for a client that takes `most` endpoints: ranges of rows, or once all of it.
pub(super) fn parts(host: &Host, segment: &LiveSegment, most: u64) -> Vec<Option<Range<u64>>> {
    let bytes: u64 = segment.tensors().iter().map(|tensor| tensor.length).sum();
    let rows = rows(segment).unwrap_or(0);
    let parts = bytes.div_ceil(host.config().endpoint_bytes().max(1));
    let parts = parts.min(most).min(ENDPOINTS_MAX).min(rows);
    if parts < 2 {
        return vec![None];
    }
    let step = rows.div_ceil(parts);
    let starts = (0..parts).map(|part| part * step);
    let starts = starts.take_while(|start| *start < rows);
    starts
        .map(|start| Some(start..rows.min(start + step)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Wanted, String> {
        Wanted::of(&Ticket::new(text.to_owned())).map_err(|status| status.message)
    }

    #[test]
    fn tickets_read_back() {
        let all = Wanted::name("x");
        let ticket = all.ticket().expect("JSON");
        assert_eq!(&ticket.ticket[..], br#"{"name":"x"}"#);
        assert_eq!(Wanted::of(&ticket).expect("a ticket"), all);
        assert_eq!(read("x"), Ok(all));
        let rows = Wanted {
            segment: Some("s".into()),
            rows: Some((0, u64::MAX)),
            ..Wanted::name("x")
        };
        let ticket = rows.ticket().expect("JSON");
        assert_eq!(
            &ticket.ticket[..],
            br#"{"name":"x","segment":"s","rows":[0,18446744073709551615]}"#
        );
        assert_eq!(Wanted::of(&ticket).expect("a ticket"), rows);
        assert_eq!(rows.source().expect("a name"), Source::Name("x"));
    }

    #[test]
    fn tickets_that_are_none_are_told_why() {
        for (text, why) in [
            ("{}", "names nothing"),
            (r#"{"rows":[0,1]}"#, "names nothing"),
            (r#"{"name":"x","segment":"s"}"#, "belong to rows"),
            (r#"{"name":"x","rows":[0,1]}"#, "need its segment"),
            (r#"{"segment":"s","rows":[2,1]}"#, "end at 1, before 2"),
            (r#"{"segment":"s","rows":[-1,1]}"#, "-1"),
            (
                r#"{"segment":"s","rows":[0,18446744073709551616]}"#,
                "expected u64",
            ),
            (r#"{"segment":"s","rows":[0,1.5]}"#, "1.5"),
            (r#"{"segment":"s","rows":[0]}"#, "length"),
            (r#"{"segment":"s","rows":[0,1,2]}"#, "rows"),
            (r#"{"segment":"s","other":1}"#, "other"),
            (r#"{"channel":"c","rows":[0,1]}"#, "no rows"),
            (r#"{"channel":"c","name":"x"}"#, "no rows"),
        ] {
            let error = read(text).expect_err(text);
            assert!(
                error.contains(why) && error.contains("FlightInfo"),
                "{text}: {error}"
            );
        }
    }
}
