import Testing

/// Each of the 75 known traps of the format has a test that is named after it: `Trap N: …`.
@Suite("Trap catalogue")
struct TrapCatalogueTests {
    /// Traps without a test, and why.
    static let excused: [Int: String] = [:]

    /// The traps that tests are named after.
    static let tested: Set<Int> = {
        var numbers: Set<Int> = []
        for source in HousekeepingTests.sources where source.path.hasPrefix("Tests/") {
            var before: Substring = ""
            for line in source.lines {
                let words = line.drop { $0 == " " }
                let name = words.hasPrefix("@Test(") ? words.dropFirst(6) : words
                if words.hasPrefix("@Test(") || before == "@Test(", let number = number(of: name) {
                    numbers.insert(number)
                }
                before = words
            }
        }
        return numbers
    }()

    /// N of a string literal that starts with `Trap N:`.
    private static func number(of name: Substring) -> Int? {
        let start = "\"Trap "
        guard name.hasPrefix(start), let colon = name.firstIndex(of: ":") else { return nil }
        return Int(name[..<colon].dropFirst(start.count))
    }

    @Test("every trap has a test of its name, or an excuse", arguments: 1...75)
    func isTested(number: Int) {
        #expect(Self.tested.contains(number) != (Self.excused[number] != nil))
    }

    @Test("no name has a number that is no trap's")
    func numbers() { #expect(Self.tested.isSubset(of: 1...75)) }

    @Test("at most five traps are excused, with a reason, and none of mapping, counts or snapshots")
    func excuses() {
        #expect(Self.excused.count <= 5)
        for (number, reason) in Self.excused {
            #expect(!(21...63).contains(number) && (1...75).contains(number))
            #expect(reason.count > 20, "trap \(number)")
        }
    }
}
