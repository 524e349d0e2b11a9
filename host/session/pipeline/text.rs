//! A pipeline as people write it, `clip(lo=0) | cast(to=int8)`, and back.
//!
//! ```text
//! pipeline = stage { "|" stage } [ "->" output { "," output } ]
//! stage    = [ name ":" ] kernel [ "(" [ item { "," item } ] ")" ]
//! item     = name "=" value            a parameter
//!          | name ":" source           an input
//! output   = name ":" source
//! kernel   = word | string             source = word | string
//! value    = word | string | "[" [ value { "," value } ] "]"       lists hold no lists
//! ```
//! A word is one or more of `A-Z a-z 0-9 _ . + - / # ~ @ %`, without `->`; a string is one of JSON. What words may mean is
//! in [`super::graph`].

use std::collections::BTreeMap;

use serde_json::{Number, Value};
use strait_protocol::{Pipeline, PipelineStage, StageInput};

use super::PipelineError;
use super::graph;

/// Whether the text for a kernel is that of a pipeline: no kernel's name has such characters.
#[must_use]
pub fn is_pipeline(text: &str) -> bool {
    text.contains(['|', '(', '>'])
}

fn is_of_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || "_.+-/#~@%".contains(c)
}

/// One word that needs no quotes.
fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().all(is_of_word) && !text.contains("->")
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Word(String),
    Text(String),
    Sign(&'static str),
}

impl Token {
    fn shown(&self) -> String {
        match self {
            Self::Word(word) => format!("`{}`", crate::text::name(word)),
            Self::Text(text) => format!("the string {:?}", crate::text::name(text)),
            Self::Sign(sign) => format!("`{sign}`"),
        }
    }
}

/// The signs, the longest first.
const SIGNS: [&str; 9] = ["->", "|", "(", ")", "[", "]", ",", ":", "="];

/// The text's tokens, each with the character at which it begins, from 1.
struct Tokens<'a> {
    text: &'a str,
    at: usize,
    /// What was looked at, and where the one after it begins.
    next: Option<(Option<Token>, usize)>,
}

impl<'a> Tokens<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            text,
            at: 0,
            next: None,
        }
    }

    fn wrong(&self, what: impl Into<String>) -> PipelineError {
        let rest = &self.text[self.at..];
        let at = self.at + (rest.len() - rest.trim_start().len());
        PipelineError::Text {
            at: self.text[..at].chars().count() + 1,
            what: what.into(),
        }
    }

    fn peek(&mut self) -> Result<Option<&Token>, PipelineError> {
        if self.next.is_none() {
            self.next = Some(self.read()?);
        }
        Ok(self.next.as_ref().and_then(|(token, _)| token.as_ref()))
    }

    fn next(&mut self) -> Result<Option<Token>, PipelineError> {
        self.peek()?;
        let taken = self.next.take();
        Ok(taken.and_then(|(token, end)| {
            self.at = end;
            token
        }))
    }

    fn is_next(&mut self, sign: &str) -> Result<bool, PipelineError> {
        Ok(matches!(self.peek()?, Some(Token::Sign(found)) if *found == sign))
    }

    /// Takes the sign, if it is there.
    fn takes(&mut self, sign: &str) -> Result<bool, PipelineError> {
        let is_there = self.is_next(sign)?;
        if is_there {
            self.next()?;
        }
        Ok(is_there)
    }

    /// The next one is not what it should be.
    fn expected(&mut self, what: &str) -> PipelineError {
        match self.peek() {
            Ok(Some(found)) => {
                let found = found.shown();
                self.wrong(format!("expected {what}, found {found}"))
            }
            Ok(None) => self.wrong(format!("expected {what}, and the text ends")),
            Err(error) => error,
        }
    }

    /// The next token, and where the one after it may begin.
    fn read(&self) -> Result<(Option<Token>, usize), PipelineError> {
        let rest = &self.text[self.at..];
        let trimmed = rest.trim_start_matches([' ', '\t', '\r', '\n']);
        let start = self.at + (rest.len() - trimmed.len());
        let Some(first) = trimmed.chars().next() else {
            return Ok((None, start));
        };
        if let Some(sign) = SIGNS.into_iter().find(|sign| trimmed.starts_with(sign)) {
            return Ok((Some(Token::Sign(sign)), start + sign.len()));
        }
        if first == '"' {
            let string = quoted(trimmed).ok_or_else(|| self.wrong("a string without an end"))?;
            let text: String = serde_json::from_str(string).map_err(|_| {
                self.wrong(
                    "a string that is not one of JSON; write \\\" and \\\\ for \" and \\ in it",
                )
            })?;
            return Ok((Some(Token::Text(text)), start + string.len()));
        }
        let end = trimmed.find(|c| !is_of_word(c)).unwrap_or(trimmed.len());
        let word = &trimmed[..end];
        let word = word.split_once("->").map_or(word, |(before, _)| before);
        if word.is_empty() {
            let found = first.escape_debug();
            return Err(self.wrong(format!("`{found}` has no meaning here; put text in quotes")));
        }
        Ok((Some(Token::Word(word.to_owned())), start + word.len()))
    }
}

/// The string at the start of `text`, with its quotes.
fn quoted(text: &str) -> Option<&str> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return Some(&text[..=at]),
            _ => {}
        }
    }
    None
}

/// Reads a pipeline.
///
/// # Errors
/// [`PipelineError::Text`] that says where, and what else the check of the graph refuses.
pub fn parse(text: &str) -> Result<Pipeline, PipelineError> {
    let mut tokens = Tokens::new(text);
    let mut pipeline = Pipeline::default();
    loop {
        pipeline.stages.push(stage(&mut tokens)?);
        if !tokens.takes("|")? {
            break;
        }
    }
    if tokens.takes("->")? {
        loop {
            let name = name(&mut tokens, "the name of an output")?;
            if !tokens.takes(":")? {
                return Err(tokens.expected("`:` and what the output is"));
            }
            let from = source(&mut tokens)?;
            put(&mut pipeline.outputs, name, from, &tokens)?;
            if !tokens.takes(",")? {
                break;
            }
        }
    }
    if tokens.peek()?.is_some() {
        return Err(tokens.expected("`|`, `->` or the end"));
    }
    graph::check(&pipeline)?;
    Ok(pipeline)
}

fn stage(tokens: &mut Tokens<'_>) -> Result<PipelineStage, PipelineError> {
    let mut stage = PipelineStage::default();
    let first = tokens.peek()?.cloned();
    let Some(Token::Word(first) | Token::Text(first)) = first else {
        return Err(tokens.expected("a kernel"));
    };
    let is_word = matches!(tokens.next()?, Some(Token::Word(_)));
    stage.kernel = first;
    if is_word && tokens.takes(":")? {
        stage.name = Some(std::mem::take(&mut stage.kernel));
        stage.kernel = match tokens.peek()?.cloned() {
            Some(Token::Word(kernel) | Token::Text(kernel)) => kernel,
            Some(Token::Sign(_)) | None => return Err(tokens.expected("a kernel")),
        };
        tokens.next()?;
    }
    if !tokens.takes("(")? || tokens.takes(")")? {
        return Ok(stage);
    }
    loop {
        let name = name(tokens, "a parameter or an input")?;
        if tokens.takes("=")? {
            let value = value(tokens, true)?;
            put(&mut stage.parameters, name, value, tokens)?;
        } else if tokens.takes(":")? {
            let from = source(tokens)?;
            put(&mut stage.inputs, name, from, tokens)?;
        } else {
            return Err(tokens.expected("`=` and a value, or `:` and where the input comes from"));
        }
        if tokens.takes(")")? {
            return Ok(stage);
        }
        if !tokens.takes(",")? {
            return Err(tokens.expected("`,` or `)`"));
        }
    }
}

fn name(tokens: &mut Tokens<'_>, what: &str) -> Result<String, PipelineError> {
    match tokens.peek()?.cloned() {
        Some(Token::Word(name)) => {
            tokens.next()?;
            Ok(name)
        }
        _ => Err(tokens.expected(what)),
    }
}

fn source(tokens: &mut Tokens<'_>) -> Result<StageInput, PipelineError> {
    let from = match tokens.peek()?.cloned() {
        Some(Token::Word(word)) => StageInput::Text(word),
        Some(Token::Text(input)) => StageInput::Input { input },
        _ => return Err(tokens.expected("a stage, `stage.port`, or an input of the pipeline")),
    };
    tokens.next()?;
    Ok(from)
}

fn put<T>(
    map: &mut BTreeMap<String, T>,
    name: String,
    value: T,
    tokens: &Tokens<'_>,
) -> Result<(), PipelineError> {
    let shown = crate::text::name(&name);
    match map.insert(name, value) {
        None => Ok(()),
        Some(_) => Err(tokens.wrong(format!("`{shown}` is given twice; once is enough"))),
    }
}

fn value(tokens: &mut Tokens<'_>, may_be_list: bool) -> Result<Value, PipelineError> {
    let value = match tokens.peek()?.cloned() {
        Some(Token::Text(text)) => Value::String(text),
        Some(Token::Word(word)) => plain(word).map_err(|what| tokens.wrong(what))?,
        Some(Token::Sign("[")) if may_be_list => {
            tokens.next()?;
            return list(tokens);
        }
        _ => return Err(tokens.expected("a value")),
    };
    tokens.next()?;
    Ok(value)
}

fn list(tokens: &mut Tokens<'_>) -> Result<Value, PipelineError> {
    let mut values = Vec::new();
    if tokens.takes("]")? {
        return Ok(Value::Array(values));
    }
    loop {
        values.push(value(tokens, false)?);
        if tokens.takes("]")? {
            return Ok(Value::Array(values));
        }
        if !tokens.takes(",")? {
            return Err(tokens.expected("`,` or `]`"));
        }
    }
}

/// What a word is as a value: true, false, a number as JSON has it, or text.
fn plain(word: String) -> Result<Value, String> {
    match word.as_str() {
        "true" => return Ok(Value::Bool(true)),
        "false" => return Ok(Value::Bool(false)),
        _ => {}
    }
    if let Ok(number) = word.parse::<Number>() {
        // To the nearest, which serde_json is not always.
        let real = word.parse::<f64>().ok().filter(|_| number.is_f64());
        let exact = real.and_then(Number::from_f64);
        return Ok(Value::Number(exact.unwrap_or(number)));
    }
    let digits = word.trim_start_matches(['+', '-', '.']);
    if digits.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(format!(
            "`{}` is not a number as JSON has them, such as 2, -0.5 or 1e3; put text in quotes",
            crate::text::name(&word)
        ));
    }
    Ok(Value::String(word))
}

/// The pipeline as [`parse`] reads it.
pub fn print(pipeline: &Pipeline) -> String {
    let stages: Vec<String> = pipeline.stages.iter().map(printed_stage).collect();
    let mut text = stages.join(" | ");
    if !pipeline.outputs.is_empty() {
        let outputs = pipeline.outputs.iter();
        let outputs: Vec<_> = outputs
            .map(|(name, from)| format!("{name}: {}", printed_source(from)))
            .collect();
        text.push_str(" -> ");
        text.push_str(&outputs.join(", "));
    }
    text
}

fn printed_stage(stage: &PipelineStage) -> String {
    let mut text = match &stage.name {
        Some(name) => format!("{name}: "),
        None => String::new(),
    };
    text.push_str(&printed_word(&stage.kernel));
    let inputs = stage.inputs.iter();
    let inputs = inputs.map(|(port, from)| format!("{port}: {}", printed_source(from)));
    let parameters = stage.parameters.iter();
    let parameters = parameters.map(|(name, value)| format!("{name}={}", printed_value(value)));
    let items: Vec<_> = inputs.chain(parameters).collect();
    if !items.is_empty() {
        text.push('(');
        text.push_str(&items.join(", "));
        text.push(')');
    }
    text
}

fn printed_source(from: &StageInput) -> String {
    match from {
        StageInput::Text(text) => text.clone(),
        StageInput::Input { input } => Value::from(input.as_str()).to_string(),
    }
}

fn printed_word(text: &str) -> String {
    match is_word(text) {
        true => text.to_owned(),
        false => Value::from(text).to_string(),
    }
}

fn printed_value(value: &Value) -> String {
    match value {
        Value::String(text) => match is_word(text).then(|| plain(text.clone())) {
            Some(Ok(Value::String(_))) => text.clone(),
            _ => value.to_string(),
        },
        Value::Array(values) => {
            let values: Vec<_> = values.iter().map(printed_value).collect();
            format!("[{}]", values.join(", "))
        }
        other => other.to_string(),
    }
}
