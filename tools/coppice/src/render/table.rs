//! Columns as wide as their widest cell.

use super::style;

/// Rows of `N` cells under a heading.
#[derive(Debug)]
pub struct Table<const N: usize> {
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    /// An empty table under `heading`.
    pub fn new(heading: [&str; N]) -> Self {
        Self { rows: vec![heading.map(str::to_owned)] }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: [String; N]) {
        self.rows.push(cells);
    }
}

impl<const N: usize> std::fmt::Display for Table<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut widths = [0; N];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(style::width(cell));
            }
        }
        for (at, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for (width, cell) in widths.iter().zip(row) {
                // Styles take no room.
                let blanks = width.saturating_sub(style::width(cell)) + 2;
                line.push_str(cell);
                line.push_str(&" ".repeat(blanks));
            }
            let line = line.trim_end();
            writeln!(f, "{}", if at == 0 { style::strong(line) } else { line.to_owned() })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_whatever_the_alphabet() {
        let mut table = Table::new(["A", "B"]);
        table.row(["größe".into(), "1".into()]);
        table.row(["x".into(), "2".into()]);
        table.row([style::bad("y"), "3".into()]);
        let text = anstream::adapter::strip_str(&table.to_string()).to_string();
        assert_eq!(text, "A      B\ngröße  1\nx      2\ny      3\n");
    }
}
