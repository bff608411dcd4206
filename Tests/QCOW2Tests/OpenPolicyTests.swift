import Glibc
import QCOW2
import Testing

@Suite("Which backing file an image may make us open")
struct OpenPolicyTests {
    let place: FileTree
    let image: String

    init() throws {
        place = try FileTree()
        _ = try place.directory("vm")
        _ = try place.directory("vm/sub")
        _ = try place.directory("elsewhere")
        image = try place.file("vm/top.qcow2")
        _ = try place.file("vm/base.raw", [1, 2, 3])
        _ = try place.file("vm/base.qcow2", [0x51, 0x46, 0x49, 0xFB, 0, 0, 0, 3])
        _ = try place.file("vm/a:b")
        _ = try place.file("vm/sub/deep.raw")
        _ = try place.file("elsewhere/secret.raw")
    }

    func resolve(
        _ reference: String, _ format: String? = "raw", policy: OpenPolicy = .imageDirectory,
        from overlay: String? = nil, probed: Bool = false, chain: [FileDevice.Identity] = []
    ) throws(ImageError) -> BackingResolver.Resolved {
        let resolver = try BackingResolver(policy: policy, imagePath: image)
        return try resolver.resolve(
            reference, format: format, from: overlay ?? image, overlayWasProbed: probed,
            chain: chain)
    }

    func expectDenied(
        _ reference: String, policy: OpenPolicy = .imageDirectory, from overlay: String? = nil,
        probed: Bool = false, sourceLocation: SourceLocation = #_sourceLocation
    ) {
        do throws(ImageError) {
            let found = try resolve(reference, policy: policy, from: overlay, probed: probed)
            Issue.record("\(found.path) was allowed", sourceLocation: sourceLocation)
        } catch {
            guard case .denied = error.kind else {
                Issue.record("\(error)", sourceLocation: sourceLocation)
                return
            }
        }
    }

    func expectBackingError(
        _ words: String, sourceLocation: SourceLocation = #_sourceLocation,
        _ body: () throws(ImageError) -> BackingResolver.Resolved
    ) {
        do throws(ImageError) {
            let found = try body()
            Issue.record("\(found.path) was accepted", sourceLocation: sourceLocation)
        } catch {
            guard case .backing(let found) = error.kind, found.contains(words) else {
                Issue.record("\(error)", sourceLocation: sourceLocation)
                return
            }
            #expect(!error.description.contains("\n"))
        }
    }

    @Test("A relative name is found beside the overlay, whatever the working directory")
    func relativeToTheOverlay() throws {
        #expect(try resolve("base.raw").path == "\(place.path)/vm/base.raw")
        #expect(try resolve("sub/deep.raw").path == "\(place.path)/vm/sub/deep.raw")
        let inSub = try place.file("vm/sub/mid.qcow2")
        #expect(try resolve("deep.raw", from: inSub).path == "\(place.path)/vm/sub/deep.raw")
        #expect(try resolve("../base.raw", from: inSub).path == "\(place.path)/vm/base.raw")
    }

    @Test("An absolute name inside of the image's directory is allowed")
    func absoluteInside() throws {
        #expect(try resolve("\(place.path)/vm/base.raw").path == "\(place.path)/vm/base.raw")
    }

    @Test("A name outside of the image's directory is denied, also where nothing is there")
    func outside() {
        expectDenied("\(place.path)/elsewhere/secret.raw")
        expectDenied("../elsewhere/secret.raw")
        expectDenied("/etc/hostname")
        expectDenied("/no/such/file")
        expectDenied("../elsewhere/missing.raw")
        expectDenied("sub/../../elsewhere/missing.raw")
    }

    @Test("A directory whose name merely begins like the image's is outside")
    func similarDirectory() throws {
        _ = try place.directory("vm2")
        expectDenied(try place.file("vm2/base.raw"))
    }

    @Test("A link out of the image's directory is denied, one that stays inside is followed")
    func links() throws {
        symlink("\(place.path)/elsewhere/secret.raw", "\(place.path)/vm/out")
        symlink("\(place.path)/elsewhere", "\(place.path)/vm/outdir")
        symlink("sub/deep.raw", "\(place.path)/vm/in")
        expectDenied("out")
        expectDenied("outdir/secret.raw")
        expectDenied("outdir/missing.raw")
        #expect(try resolve("in").path == "\(place.path)/vm/sub/deep.raw")
    }

    @Test("An image named through a link has the link's directory and its own")
    func linkedImage() throws {
        let link = "\(place.path)/elsewhere/link.qcow2"
        symlink(image, link)
        let resolver = try BackingResolver(policy: .imageDirectory, imagePath: link)
        let beside = try resolver.resolve("secret.raw", format: "raw", from: link, chain: [])
        #expect(beside.path == "\(place.path)/elsewhere/secret.raw")
        let own = try resolver.resolve(
            "\(place.path)/vm/base.raw", format: "raw", from: link, chain: [])
        #expect(own.path == "\(place.path)/vm/base.raw")
    }

    @Test("A linked backing file's own references start where the link is, as in QEMU")
    func linkInTheChain() throws {
        let real = try place.file("vm/sub/mid.qcow2")
        symlink(real, "\(place.path)/vm/mid.qcow2")
        let middle = try resolve("mid.qcow2", "qcow2")
        #expect(middle.path == real && middle.location == "\(place.path)/vm/mid.qcow2")
        let base = try resolve("base.raw", from: middle.location)
        #expect(base.path == "\(place.path)/vm/base.raw")
    }

    @Test("Allowed directories widen, trust opens")
    func widened() throws {
        let outside = "\(place.path)/elsewhere/secret.raw"
        let allowed = OpenPolicy(allowedDirectories: ["\(place.path)/elsewhere"])
        #expect(try resolve(outside, policy: allowed).path == outside)
        expectDenied("/etc/hostname", policy: allowed)
        #expect(try resolve(outside, policy: OpenPolicy(trustsEverything: true)).path == outside)
    }

    @Test(
        "Whatever has a scheme is refused, trusted or not",
        arguments: ["json:{}", "nbd://host/x", "nbd:unix:/x", "file:base.raw", "a:b", ":x"])
    func schemes(reference: String) {
        for policy in [OpenPolicy.imageDirectory, OpenPolicy(trustsEverything: true)] {
            expectBackingError("only plain local paths") { () throws(ImageError) in
                try resolve(reference, policy: policy)
            }
        }
    }

    @Test("A colon behind a slash is part of a name")
    func colonInName() throws {
        #expect(try resolve("./a:b").path == "\(place.path)/vm/a:b")
    }

    @Test("Formats other than raw and qcow2 are refused by name")
    func otherFormats() {
        expectBackingError("'vmdk'") { () throws(ImageError) in try resolve("base.raw", "vmdk") }
    }

    @Test("A format that is given is obeyed, whatever the file's first bytes are")
    func givenFormat() throws {
        let found = try resolve("base.qcow2", "raw")
        #expect(found.format == .raw && !found.isProbed)
    }

    @Test("Without a format the magic decides, and the layer is marked as guessed")
    func probed() throws {
        let qcow2 = try resolve("base.qcow2", nil)
        #expect(qcow2.format == .qcow2 && qcow2.isProbed)
        let raw = try resolve("base.raw", nil)
        #expect(raw.format == .raw && raw.isProbed)
    }

    @Test("A layer whose format was guessed may name no further files, except when trusted")
    func probedLayerNamesNothing() throws {
        expectDenied("base.raw", probed: true)
        #expect(
            try resolve("base.raw", policy: OpenPolicy(trustsEverything: true), probed: true).path
                == "\(place.path)/vm/base.raw")
    }

    @Test("Directories, FIFOs and character devices are never a backing file")
    func specialFiles() {
        mkfifo("\(place.path)/vm/fifo", 0o600)
        for reference in ["sub", "fifo"] {
            expectBackingError("neither a file nor") { () throws(ImageError) in
                try resolve(reference)
            }
        }
        expectBackingError("neither a file nor") { () throws(ImageError) in
            try resolve("/dev/zero", policy: OpenPolicy(trustsEverything: true))
        }
    }

    @Test("A missing file is an error with its name")
    func missing() {
        expectBackingError("missing.raw") { () throws(ImageError) in try resolve("missing.raw") }
    }

    @Test("A chain that comes back to one of its files is refused")
    func loop() throws {
        let base = try resolve("base.raw").identity
        expectBackingError("comes back") { () throws(ImageError) in
            try resolve("base.raw", chain: [base])
        }
        link("\(place.path)/vm/base.raw", "\(place.path)/vm/other-name.raw")
        expectBackingError("comes back") { () throws(ImageError) in
            try resolve("other-name.raw", chain: [base])
        }
    }

    @Test("A chain of 200 files is accepted, one of 201 is not")
    func depth() throws {
        let other = try resolve("./a:b").identity
        let chain = Array(repeating: other, count: 199)
        #expect(try resolve("base.raw", chain: chain).format == .raw)
        expectBackingError("more than 200") { () throws(ImageError) in
            try resolve("base.raw", chain: chain + [other])
        }
    }

    // MARK: External data files

    func resolveData(
        _ reference: String, policy: OpenPolicy = .imageDirectory, probed: Bool = false,
        chain: [FileDevice.Identity] = []
    ) throws(ImageError) -> BackingResolver.Resolved {
        let resolver = try BackingResolver(policy: policy, imagePath: image)
        return try resolver.resolveDataFile(
            reference, from: image, imageWasProbed: probed, chain: chain)
    }

    @Test("A data file is found beside the image, and only in the image's directory")
    func dataFileInside() throws {
        #expect(try resolveData("base.raw").path == "\(place.path)/vm/base.raw")
        #expect(try resolveData("\(place.path)/vm/sub/deep.raw").format == .raw)
        let outside = "\(place.path)/elsewhere/secret.raw"
        let wide = OpenPolicy(allowedDirectories: ["\(place.path)/elsewhere"])
        #expect(try resolveData(outside, policy: wide).path == outside)
        #expect(
            try resolveData(outside, policy: OpenPolicy(trustsEverything: true)).path == outside)
    }

    @Test(
        "Trap 18: a data file's name opens nothing outside of the image's directory",
        arguments: ["/etc/hostname", "../elsewhere/secret.raw", "sub/../../elsewhere/no", "link"])
    func dataFileOutside(reference: String) throws {
        symlink("\(place.path)/elsewhere/secret.raw", "\(place.path)/vm/link")
        do throws(ImageError) {
            let found = try resolveData(reference)
            Issue.record("\(found.path) was allowed")
        } catch {
            guard case .denied = error.kind else { throw error }
            #expect(error.description.contains("--allow-path"))
        }
    }

    @Test(
        "A data file with a scheme, without a name, or that is no file is a typed error",
        arguments: ["json:{}", "nbd://host/x", "file:base.raw", "", "a\0b", "sub", "missing.raw"])
    func dataFileUnusable(reference: String) {
        do throws(ImageError) {
            let found = try resolveData(reference, policy: OpenPolicy(trustsEverything: true))
            Issue.record("\(found.path) was accepted")
        } catch {
            guard case .dataFile(let words) = error.kind else {
                Issue.record("\(error)")
                return
            }
            #expect(words.contains("data file") && !words.contains("\n"))
        }
    }

    @Test("An image is not its own data file, and one that was guessed to be an image has none")
    func dataFileOfTheChain() throws {
        let base = try resolveData("base.raw").identity
        #expect(throws: ImageError.self) { try resolveData("base.raw", chain: [base]) }
        #expect(throws: ImageError.self) { try resolveData("base.raw", probed: true) }
    }

    @Test("Control characters of a name do not reach the terminal")
    func printableNames() {
        do throws(ImageError) {
            _ = try resolve("x\u{1B}[2J\n")
        } catch {
            #expect(!error.description.unicodeScalars.contains { $0.value < 32 })
        }
    }
}
