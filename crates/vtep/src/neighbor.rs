//! Answers for neighbours from the table.
