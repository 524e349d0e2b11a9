//! What somebody may do, and the words for it: `put,get,call:scale-*`.

use std::fmt;

use wildmatch::WildMatch;

/// Most words of one list of rights.
const WORDS_MAX: usize = 256;
/// Longest pattern of kernels in bytes.
const PATTERN_BYTES_MAX: usize = 200;

/// Which kernels somebody may run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kernels {
    /// Each one.
    All,
    /// Those whose `name` or `plugin/name` one of these patterns matches; `*` stands for any characters.
    Matching(Vec<String>),
}

/// What somebody may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rights {
    /// Make and adopt segments; name, replace and drop flights.
    pub put: bool,
    /// List, look up, map and read its flights, and those shared with it.
    pub get: bool,
    /// Run kernels.
    pub call: Kernels,
    /// Let others read its flights.
    pub share: bool,
    /// Add plugins.
    pub load: bool,
    /// See and change what belongs to everybody: it is an operator of the host.
    pub admin: bool,
}

impl Rights {
    /// None at all.
    #[must_use]
    pub fn none() -> Self {
        Self {
            put: false,
            get: false,
            call: Kernels::Matching(Vec::new()),
            share: false,
            load: false,
            admin: false,
        }
    }

    /// Everything that concerns one's own flights.
    #[must_use]
    pub fn of_a_user() -> Self {
        Self {
            put: true,
            get: true,
            call: Kernels::All,
            share: true,
            load: false,
            admin: false,
        }
    }

    /// Everything.
    #[must_use]
    pub fn of_an_operator() -> Self {
        Self {
            load: true,
            admin: true,
            ..Self::of_a_user()
        }
    }

    /// Reads words such as `put` and `call:scale-*`; `call` alone is every kernel.
    ///
    /// # Errors
    /// What is wrong with which word.
    pub fn parse<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<Self, String> {
        let mut rights = Self::none();
        for (index, word) in words.into_iter().enumerate() {
            if index == WORDS_MAX {
                return Err(format!("more than {WORDS_MAX} rights"));
            }
            match word {
                "put" => rights.put = true,
                "get" => rights.get = true,
                "call" => rights.call = Kernels::All,
                "share" => rights.share = true,
                "load" => rights.load = true,
                "admin" => rights.admin = true,
                _ => match word.strip_prefix("call:") {
                    Some(pattern) if is_pattern(pattern) => rights.add_pattern(pattern),
                    _ => return Err(unknown(word)),
                },
            }
        }
        Ok(rights)
    }

    fn add_pattern(&mut self, pattern: &str) {
        if let Kernels::Matching(patterns) = &mut self.call
            && !patterns.iter().any(|known| known == pattern)
        {
            patterns.push(pattern.to_owned());
        }
    }

    /// Adds what `other` allows.
    pub(super) fn add(&mut self, other: &Self) {
        self.put |= other.put;
        self.get |= other.get;
        self.share |= other.share;
        self.load |= other.load;
        self.admin |= other.admin;
        match &other.call {
            Kernels::All => self.call = Kernels::All,
            Kernels::Matching(patterns) => {
                patterns.iter().for_each(|one| self.add_pattern(one));
            }
        }
    }

    /// Whether that kernel is among those it may run.
    #[must_use]
    pub fn may_call(&self, plugin: &str, kernel: &str) -> bool {
        match &self.call {
            Kernels::All => true,
            Kernels::Matching(patterns) => patterns.iter().any(|pattern| {
                let pattern = WildMatch::new(pattern);
                pattern.matches(kernel) || pattern.matches(&format!("{plugin}/{kernel}"))
            }),
        }
    }

    /// The words that [`Self::parse`] reads.
    #[must_use]
    pub fn words(&self) -> Vec<String> {
        let mut words = Vec::new();
        let mut add = |has: bool, word: &str| words.extend(has.then(|| word.to_owned()));
        add(self.put, "put");
        add(self.get, "get");
        match &self.call {
            Kernels::All => add(true, "call"),
            Kernels::Matching(patterns) => {
                patterns
                    .iter()
                    .for_each(|one| add(true, &format!("call:{one}")));
            }
        }
        add(self.share, "share");
        add(self.load, "load");
        add(self.admin, "admin");
        words
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.words() {
            words if words.is_empty() => f.write_str("nothing"),
            words => f.write_str(&words.join(",")),
        }
    }
}

fn is_pattern(pattern: &str) -> bool {
    !pattern.is_empty()
        && pattern.len() <= PATTERN_BYTES_MAX
        && !pattern.chars().any(|c| c.is_control() || c == ',')
}

fn unknown(word: &str) -> String {
    format!(
        "`{}` is not a right; rights are put, get, call, call:PATTERN, share, load and admin",
        crate::text::name(word)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Rights, String> {
        Rights::parse(text.split(','))
    }

    #[test]
    fn patterns_name_kernels_with_or_without_their_plugin() {
        let may = |pattern: &str, kernel: &str| {
            let rights = Rights {
                call: Kernels::Matching(vec!["none".to_owned(), pattern.to_owned()]),
                ..Rights::none()
            };
            rights.may_call("std", kernel)
        };
        for (pattern, allowed) in [
            ("scale-*", true),
            ("scale-shift", true),
            ("std/scale-shift", true),
            ("std/*", true),
            ("*", true),
            ("scale", false),
            ("other/*", false),
            ("", false),
        ] {
            assert_eq!(may(pattern, "scale-shift"), allowed, "{pattern}");
        }
        assert!(!Rights::none().may_call("std", ""));
        assert!(Rights::of_a_user().may_call("std", "any"));
    }

    #[test]
    fn words_are_read_and_written() {
        for text in [
            "put,get,call,share,load,admin",
            "put,get,call:scale-*,call:std/zscore",
            "admin",
        ] {
            assert_eq!(read(text).expect(text).words().join(","), text);
        }
        assert_eq!(
            Rights::of_an_operator(),
            read("admin,load,share,call,get,put").expect("all")
        );
        assert_eq!(read("call:a,call").expect("rights").call, Kernels::All);
        assert_eq!(read("call,call:a").expect("rights").call, Kernels::All);
        assert_eq!(Rights::none().to_string(), "nothing");
        for text in ["", "Put", "call:", "run", "put get", "get,,put", "call:a\n"] {
            assert!(
                read(text).expect_err(text).contains("not a right"),
                "{text}"
            );
        }
    }

    #[test]
    fn rights_of_groups_are_added() {
        let mut rights = read("get,call:a").expect("rights");
        rights.add(&read("put,call:a,call:b").expect("rights"));
        assert_eq!(rights, read("put,get,call:a,call:b").expect("rights"));
        rights.add(&read("call").expect("rights"));
        assert_eq!(rights.call, Kernels::All);
    }
}
