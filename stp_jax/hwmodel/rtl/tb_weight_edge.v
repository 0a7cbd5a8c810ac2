// Test bench: streams the groups of weights.hex back to back, SLOTS slots each, and prints one wire
// slot {valid, sign, exponent, index} a cycle, in hexadecimal.
module tb_weight_edge;
    parameter GROUP = 8;
    parameter WIDTH = 8;
    parameter SLOTS = 8;
    parameter GROUPS = 1;
    localparam INDEX = $clog2(GROUP);
    localparam EXPONENT = $clog2(WIDTH);
    parameter SLOT_BITS = 2 + EXPONENT + INDEX;  // a slot on the wires, as the images have it

    reg clock = 0;
    reg load = 0;
    reg [GROUP*WIDTH-1:0] memory [0:GROUPS-1];
    reg [GROUP*WIDTH-1:0] weights;
    wire valid, sign;
    wire [EXPONENT-1:0] exponent;
    wire [INDEX-1:0] index;
    wire [SLOT_BITS-1:0] word = {valid, sign, exponent, index};
    integer cycle;

    weight_edge #(.GROUP(GROUP), .WIDTH(WIDTH)) edge_of_row (
        .clock(clock), .reset(1'b0), .load(load), .weights(weights),
        .valid(valid), .sign(sign), .exponent(exponent), .index(index)
    );

    initial begin
        if (SLOT_BITS != 2 + EXPONENT + INDEX) $display("FAIL: SLOT_BITS is %0d", SLOT_BITS);
        $readmemh("weights.hex", memory);
        for (cycle = 0; cycle <= GROUPS * SLOTS; cycle = cycle + 1) begin
            load = cycle % SLOTS == 0 && cycle < GROUPS * SLOTS;
            if (load) weights = memory[cycle / SLOTS];
            #1 if (cycle > 0) $display("%h", word);
            clock = 1;
            #1 clock = 0;
        end
    end
endmodule
