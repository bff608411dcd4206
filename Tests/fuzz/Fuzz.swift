import Glibc
import TestSupport

/// Gives libFuzzer's inputs to the library, or writes the images that it starts from.
@main
struct Fuzz {
    static func main() {
        if CommandLine.arguments.count == 3, CommandLine.arguments[1] == "--seeds" {
            return writeSeeds(to: CommandLine.arguments[2])
        }
        var count = CommandLine.argc
        var words: UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>? = CommandLine.unsafeArgv
        exit(
            runDriver(&count, &words) { bytes, byteCount in
                let input = [UInt8](UnsafeBufferPointer(start: bytes, count: byteCount))
                if let fault = HostileImage.fault(of: input) { fatalError(fault) }
                return 0
            })
    }

    private static func writeSeeds(to folder: String) {
        for (number, bytes) in HostileImage.seeds.enumerated() {
            guard let file = fopen("\(folder)/seed-\(number)", "w") else { exit(1) }
            fwrite(bytes, 1, bytes.count, file)
            fclose(file)
        }
    }
}

/// libFuzzer's own main: runs the inputs that the arguments ask for.
@_silgen_name("LLVMFuzzerRunDriver")
private func runDriver(
    _ count: UnsafeMutablePointer<Int32>,
    _ words: UnsafeMutablePointer<UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>?>,
    _ use: @convention(c) (UnsafePointer<UInt8>?, Int) -> Int32
) -> Int32
