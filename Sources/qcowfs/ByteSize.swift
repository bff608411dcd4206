internal import ArgumentParser

/// A number of bytes as people write it: `512`, `64k`, `10M`, `1.5G`, `2TiB`; powers of 1024.
struct ByteSize: Equatable, ExpressibleByArgument {
    let byteCount: UInt64

    static let units: [Character] = ["k", "M", "G", "T", "P", "E"]

    init(byteCount: UInt64) { self.byteCount = byteCount }

    /// Nil where the words are no size, or one of 2^64 bytes and more.
    init?(argument: String) {
        let number = argument.prefix { $0.isASCII && ($0.isNumber || $0 == ".") }
        guard let unit = Self.unit(argument[number.endIndex...]),
            let byteCount = Self.product(number, unit)
        else { return nil }
        self.byteCount = byteCount
    }

    /// The bytes that a suffix stands for: nothing or `B` for 1, `k`, `K` or `KiB` for 1024…
    private static func unit(_ suffix: Substring) -> UInt64? {
        guard let letter = suffix.first else { return 1 }
        if suffix == "B" || suffix == "b" { return 1 }
        guard suffix.dropFirst().isEmpty || suffix.dropFirst() == "iB",
            let power = units.firstIndex(where: { $0.uppercased() == letter.uppercased() })
        else { return nil }
        return 1 << (10 * UInt64(power + 1))
    }

    /// `number`, which may have a fraction, times `unit`, without what is less than a byte.
    private static func product(_ number: Substring, _ unit: UInt64) -> UInt64? {
        let parts = number.split(separator: ".", omittingEmptySubsequences: false)
        guard parts.count <= 2, let whole = UInt64(parts[0]) else { return nil }
        let (bytes, overflow) = whole.multipliedReportingOverflow(by: unit)
        if overflow { return nil }
        guard parts.count == 2 else { return bytes }
        guard unit > 1, (1...9).contains(parts[1].count), let fraction = UInt64(parts[1]) else {
            return nil
        }
        let scale = parts[1].reduce(UInt64(1)) { scale, _ in scale * 10 }
        // A fraction is below 10^9, so dividing first keeps every step below 2^64.
        let part = unit / scale * fraction + unit % scale * fraction / scale
        let sum = bytes.addingReportingOverflow(part)
        return sum.overflow ? nil : sum.partialValue
    }
}

extension ByteSize: CustomStringConvertible {
    /// Three digits and a unit, as qemu-img writes sizes: `512 B`, `196 KiB`, `1.5 GiB`.
    var description: String {
        var power = 0
        var value = Double(byteCount)
        // 1000 KiB would need a fourth digit, so MiB begin there.
        while value >= 1000 && power < Self.units.count {
            value /= 1024
            power += 1
        }
        let unit = power == 0 ? "B" : "\(Self.units[power - 1].uppercased())iB"
        return "\(Self.threeDigits(value)) \(unit)"
    }

    private static func threeDigits(_ value: Double) -> String {
        let decimals = value >= 100 ? 0 : value >= 10 ? 1 : value >= 1 ? 2 : 3
        let scale = (0..<decimals).reduce(1) { scale, _ in scale * 10 }
        // Below 1000 · 1000.
        let scaled = Int((value * Double(scale)).rounded(.toNearestOrEven))
        guard decimals > 0, scaled % scale != 0 else { return String(scaled / scale) }
        let digits = String(scaled % scale)
        var fraction = String(repeating: "0", count: decimals - digits.count) + digits
        while fraction.hasSuffix("0") { fraction.removeLast() }
        return "\(scaled / scale).\(fraction)"
    }
}
